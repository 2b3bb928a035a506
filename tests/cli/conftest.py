"""A folder with a tiny model, heads for it and data, in which commands of `mara-tools` are run."""

from __future__ import annotations

import logging
import sys

import pytest
from commands import PAIRS, PROMPTS, QUICK, VOWELS, run, write_rows

from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer

BAD_REWARDS = {
    "raises": "def judge(completions, **_):\n    raise ValueError('first\\nsecond')\n",
    "short": "def judge(completions, **_):\n    return [0.0]\n",
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model, heads for it, and data."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    random_head(32, "residual").save_pretrained(folder / "head")
    random_head(32, "paper").save_pretrained(folder / "paper-head")
    write_rows(folder / "prompts.jsonl", PROMPTS)
    write_rows(folder / "pairs.jsonl", PAIRS)
    return folder


@pytest.fixture(autouse=True)
def no_log_left_open(monkeypatch):
    """`--verbose` and `--debug` log for the rest of the process, to a stream that is a test's own."""
    logger = logging.getLogger("mara_integrations")
    for name in ("handlers", "level", "propagate"):
        monkeypatch.setattr(logger, name, getattr(logger, name))


@pytest.fixture
def in_the_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))  # rewards make their folders importable


@pytest.fixture(scope="session")
def rewarded(folder):
    """What training on a reward said, and the head it left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        data = ("--data", "prompts.jsonl", "--reward", VOWELS)
        return run("train", "--model", "model", "--output", "rewarded", "--system-prompt", "be kind", *data, *QUICK)


@pytest.fixture
def bad(folder, tmp_path):
    """Things that can't be used."""
    (tmp_path / "empty.jsonl").write_text("")
    write_rows(tmp_path / "row.jsonl", [*PAIRS, {"prompt": "x", "rejected": "y"}])
    random_head(48, "residual").save_pretrained(tmp_path / "wide")
    random_head(32, "residual").save_pretrained(tmp_path / "corrupt")
    (tmp_path / "corrupt" / "head.safetensors").write_bytes(b"\x00" * 40)
    for name, text in BAD_REWARDS.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path
