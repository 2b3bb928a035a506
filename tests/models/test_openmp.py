"""Threads of OpenMP: those that a thread keeps are ended, and waiting ones sleep soon."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mara_integrations.engine import workers
from mara_integrations.models import openmp
from mara_integrations.runtime import MARAEngine
from mara_integrations.testing import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
_SCRIPT = """
import os, threading, torch
from mara_integrations.models.openmp import release_threads

def num_threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
x = torch.linspace(0, 1, 1 << 20)
y = x.exp()
kept = num_threads()
other = threading.Thread(target=release_threads)
other.start()
other.join()
others = num_threads()
release_threads()
left = num_threads()
assert x.exp().equal(y)
print(kept - others, kept - left, num_threads() - left)
"""


@pytest.mark.skipif(openmp._gnu_openmp() is None, reason="torch does not use GNU's OpenMP here")
def test_a_thread_s_own_threads_end_and_come_back():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    assert said.stdout.split() == ["0", "2", "2"]


def test_nothing_happens_where_torch_uses_another_library(monkeypatch):
    monkeypatch.setattr(openmp, "_gnu_openmp", lambda: None)
    openmp.release_threads()


def test_who_loads_a_model_or_asks_it_releases_its_threads(monkeypatch):
    released = []
    monkeypatch.setattr(workers, "release_threads", lambda: released.append(threading.current_thread()))
    with MARAEngine((tiny_model(), tiny_tokenizer())) as engine:
        engine.load()
        assert released == [threading.main_thread()]
        caller = threading.Thread(target=engine.generate, args=("hi",), kwargs={"max_new_tokens": 2})
        caller.start()
        caller.join()
    assert set(released[1:]) == {caller}


@pytest.mark.parametrize(
    ("given", "rounds"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_wait_as_the_environment_says(monkeypatch, given, rounds):
    monkeypatch.setattr(os, "environ", dict(given))
    openmp.wait_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == rounds
