"""Threads of OpenMP: those that a thread keeps are ended, and waiting ones sleep where others compute."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mara_integrations.engine import workers
from mara_integrations.engine.backends.fused import FusedBackend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.request import Request
from mara_integrations.models import openmp
from mara_integrations.runtime import MARAEngine
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
has_gnu_openmp = pytest.mark.skipif(openmp._gnu_openmp() is None, reason="torch does not use GNU's OpenMP here")
_SCRIPT = """
import os, threading, time, torch
from mara_integrations.models.openmp import release_threads

def num_threads(expected):
    for _ in range(1000):  # one that has ended is counted for a moment
        if (number := len(os.listdir("/proc/self/task"))) == expected:
            break
        time.sleep(0.01)
    return number

torch.set_num_threads(3)
x = torch.linspace(0, 1, 1 << 20)
y = x.exp()
all_of_them = len(os.listdir("/proc/self/task"))
other = threading.Thread(target=release_threads)
other.start()
other.join()
assert num_threads(all_of_them) == all_of_them
release_threads()
assert num_threads(all_of_them - 2) == all_of_them - 2
assert x.exp().equal(y)
assert num_threads(all_of_them) == all_of_them
"""


@has_gnu_openmp
def test_a_thread_s_own_threads_end_and_come_back():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", _SCRIPT], env=environment, timeout=120, check=True)


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


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """For what decides; the tests compute on one."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@has_gnu_openmp
def test_threads_sleep_while_another_program_takes_a_processor(monkeypatch):
    threads = openmp.WaitingThreads()
    threads.observe(0.15, 0.15)
    assert not threads.is_asleep
    threads.observe(0.05, 0.02)  # 0.17 s of 0.2 s
    assert threads.is_asleep
    before = threading.active_count()
    threads.observe(3.9, 3.9)
    assert threads.is_asleep
    threads.observe(0.1, 0.1)
    assert not threads.is_asleep and threading.active_count() == before - 1
    threads.observe(0.3, 0.29)
    assert not threads.is_asleep
    threads.observe(0.3, 0.1)
    assert threads.is_asleep
    threads.close()
    threads.close()
    elsewhere = openmp.WaitingThreads(on_cpu=False)
    elsewhere.observe(0.3, 0.1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    threads.observe(0.3, 0.1)
    assert not elsewhere.is_asleep and not threads.is_asleep
    assert not threads.is_asleep and threading.active_count() == before - 1


def test_work_is_timed_with_the_processor_that_it_had():
    threads, seen = openmp.WaitingThreads(), []
    threads.observe = lambda *times: seen.append(times)
    with threads.observed():
        time.sleep(0.2)
    (wall_s, cpu_s) = seen[0]
    assert wall_s > 0.19 and cpu_s < wall_s / 2


@pytest.fixture
def never_free(monkeypatch):
    """Every processor seems to be taken."""
    monkeypatch.setattr(openmp, "_FREE", 2.0)
    monkeypatch.setattr(openmp, "_WINDOW_S", 0.0)


def names():
    return [thread.name for thread in threading.enumerate()]


@has_gnu_openmp
@pytest.mark.usefixtures("never_free")
def test_a_worker_is_observed_and_leaves_no_thread():
    with MARAEngine((tiny_model(), tiny_tokenizer())) as engine:
        stream = engine.stream("hi", max_new_tokens=50)
        next(stream)
        assert "mara-idle" in names()
        stream.close()
    assert "mara-idle" not in names()


@has_gnu_openmp
@pytest.mark.usefixtures("never_free")
def test_a_batch_to_train_on_is_observed_and_leaves_no_thread():
    seen = []
    requests = [Request([1], SamplingParams(max_new_tokens=n), GateParams()) for n in (3, 9)]
    Decoder(FusedBackend(tiny_model())).run(requests, lambda _: seen.append("mara-idle" in names()))
    assert seen == [True, True] and "mara-idle" not in names()
