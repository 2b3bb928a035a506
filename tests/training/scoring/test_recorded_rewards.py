"""Rewards that a head's config names are built only where that runs no code and loads no model."""

from __future__ import annotations

import sys

import pytest

from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.rewards import reward_name
from mara_integrations.testing import tiny_model, tiny_tokenizer
from mara_integrations.training.scoring.recorded_rewards import recorded_rewards

RULE = {"kind": "forbidden_words", "words": ["however"]}
LENGTH = {"kind": "ready", "name": "length", "arguments": {"words": "20"}}


@pytest.fixture(scope="module")
def model():
    return load_model(ModelSpec((tiny_model(), tiny_tokenizer())))


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module that leaves a trace when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "evil.py").write_text("import os; os.mkdir('pwned')\ndef f(completions, **_):\n    return [0.0]\n")
    yield tmp_path
    sys.modules.pop("evil", None)


def combined(*specs):
    return {"kind": "combined", "normalise": False, "parts": [{"reward": spec, "weight": 1.0} for spec in specs]}


HOSTILE = {
    "a function of a file": ({"kind": "function", "path": "evil.py:f"}, "imports code ('evil.py:f')"),
    "a function of a module": ({"kind": "function", "path": "evil:f"}, "imports code ('evil:f')"),
    "a function within a sum": (combined(RULE, combined({"kind": "function", "path": "evil:f"})), "imports code"),
    "a model": ({"kind": "model", "source": "nobody/evil", "arguments": {}}, "loads a model ('nobody/evil')"),
    "toxicity": ({"kind": "ready", "name": "toxicity", "arguments": {}}, "may load a model"),
    "an unknown name": ({"kind": "ready", "name": "evil:f", "arguments": {}}, "may load a model"),
    "a name that is a list": ({"kind": "ready", "name": ["length"], "arguments": {}}, "may load a model"),
    "a pattern of 10,000 characters": (
        {"kind": "ready", "name": "regex", "arguments": {"pattern": "(a+)+" * 2000}},
        "may load a model",
    ),
    "an unknown kind": ({"kind": "other"}, "of the kind 'other'"),
    "no kind": ({}, "of the kind None"),
    "a sum of nothing": ({"kind": "combined"}, "left out"),
    "a sum of texts": ({"kind": "combined", "parts": ["evil:f"]}, "of the kind None"),
    "words that are numbers": ({"kind": "forbidden_words", "words": [1, 2]}, "left out"),
    "arguments that are a list": ({"kind": "ready", "name": "length", "arguments": [1]}, "left out"),
    "a file elsewhere": (
        {"kind": "reward_model", "name": "x", "file": "../evil.py", "sha256": "0" * 64},
        "left out",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_could_run_code_is_left_out_and_said(evil, model, kind):
    spec, said = HOSTILE[kind]

    rewards, left_out = recorded_rewards([RULE, spec, LENGTH], [evil], model)

    assert list(map(reward_name, rewards)) == [reward_name(rewards[0]), "length"]
    assert len(left_out) == 1 and said in left_out[0]
    assert not (evil / "pwned").exists() and "evil" not in sys.modules


def test_the_message_says_how_to_enable_it(evil, model):
    _, (reason,) = recorded_rewards([{"kind": "function", "path": "evil:f"}], [evil], model)
    assert "--reward" in reason and "--trust-head-code" in reason


def test_the_user_may_trust_a_head(evil, model):
    rewards, left_out = recorded_rewards([{"kind": "function", "path": "evil.py:f"}], [evil], model, trust_code=True)
    assert [reward_name(reward) for reward in rewards] == ["f"] and left_out == []
    assert (evil / "pwned").exists()
