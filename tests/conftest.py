"""Shared by all tests: no network, one thread a process (the tests run in parallel), the real model once."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import settings

from mara_integrations.engine.cost import CostCurve
from mara_integrations.progress import Reporter
from mara_integrations.testing import tiny_model, tiny_tokenizer

settings.register_profile("unhurried", deadline=None)  # on a busy machine any example may take long
settings.load_profile("unhurried")
torch.set_num_threads(1)


class Interrupting(Reporter):
    """Ctrl-C once a stage has come this far."""

    def __init__(self, stage, after):
        self.name, self.left = stage, after

    @contextmanager
    def stage(self, name, total):
        def advance(count):
            if name == self.name:
                self.left -= count
                if self.left <= 0:
                    raise KeyboardInterrupt

        yield advance


@pytest.fixture(autouse=True)
def own_reply_cache(tmp_path_factory, monkeypatch):
    """No test finds the replies of another."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("mara_integrations.training.keeping.cache_dir", lambda: folder)


@pytest.fixture
def nothing_fed_ahead(monkeypatch):
    """For models first used in the test, two tokens in a forward cost as much as two forwards, whatever the machine."""
    monkeypatch.setattr("mara_integrations.engine.decoder.measure", lambda *_: CostCurve(((1, 1.0), (2, 2.0))))


@pytest.fixture
def interrupting():
    return Interrupting


@pytest.fixture
def folder_model(tmp_path):
    """A model as a folder on disk, as `--model` names one."""
    folder = tmp_path / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} {chr(97 + i % 26)}?"}) + "\n" for i in range(20)))
    return path
