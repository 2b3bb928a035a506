"""Shared by all tests: no network, one thread a process (the tests run in parallel), the real model once."""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import settings

from mara_integrations.progress import Reporter

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


@pytest.fixture
def interrupting():
    return Interrupting
