"""Banks larger than the memory they may take: the same numbers from files, the same heads, and no file is left."""

from __future__ import annotations

import os

import pytest
import torch

from mara_integrations.errors import OutputError
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.records import memory_mapped as states
from mara_integrations.training.records import store
from mara_integrations.training.run import train


@pytest.fixture
def nothing_fits(monkeypatch):
    monkeypatch.setattr(states, "MAX_BYTES_IN_MEMORY", 0)


def test_what_does_not_fit_is_joined_in_a_file_that_is_gone_with_it(nothing_fits):
    parts = [torch.randn(n, 5).half() for n in (3, 0, 4)]
    whole = states.joined(parts)
    assert torch.equal(whole, torch.cat(parts)) and whole.untyped_storage().is_shared()
    assert not list(store.cache_dir().glob("states-*"))


def test_a_disk_without_room_for_it_is_named(nothing_fits, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"no room for 0\.0 GB of hidden states.*No space left on device"):
        states.joined([torch.zeros(2, 3).half()] * 2)


@pytest.mark.parametrize("how", [{"partial_text": True, "rounds": 1}, {"method": "value"}], ids=["rloo", "value"])
def test_a_head_is_the_same_wherever_its_bank_was(folder_model, prompts_file, tmp_path, monkeypatch, how):
    def fingerprint(name):
        small = {"max_reply_tokens": 8, "epochs": 2, "inner_size": 16, "eval_prompts": 0, "max_replies": 24}
        named = {"model": folder_model, "data": prompts_file, "output": tmp_path / name}
        return train(
            TrainConfig.of(**named, reward="tests/reward_for_tests.py:vowels", **small, **how)
        ).head.fingerprint

    in_memory = fingerprint("memory")
    monkeypatch.setattr(states, "MAX_BYTES_IN_MEMORY", 0)
    assert fingerprint("disk") == in_memory


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="only Linux says what is mapped")
def test_tensors_of_a_file_are_mapped_not_read(tmp_path):
    path, given = tmp_path / "part.pt", {"states": torch.randn(1000, 8).half(), "texts": ["a", "b"]}
    store.load_or_compute(path, lambda: given)
    kept = store.load(path)
    assert torch.equal(kept["states"], given["states"]) and kept["texts"] == given["texts"]
    with open("/proc/self/maps") as maps:
        assert str(path) in maps.read()
