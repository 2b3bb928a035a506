"""The settings of a run as a whole: what counts for its identity, and the file that gives them back."""

from __future__ import annotations

from pathlib import Path

import pytest

from mara_integrations.training.config import GROUPS, TrainConfig, read_settings
from mara_integrations.training.registry import METHODS
from mara_integrations.training.settings.methods import MethodSettings, TakenBy


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"output": "other", "overwrite": True, "data": "copy.jsonl", "prompts": "mine.jsonl"},
        {"device": "cuda:1", "ray": 2, "track": ["wandb"], "push_to_hub": "me/head", "public": True},
        {"reward_timeout_s": 1.0, "max_judge_calls": 7},
    ],
    ids=["paths", "machine", "limits"],
)
def test_what_does_not_decide_the_head_is_no_part_of_its_description(elsewhere):
    usual = TrainConfig.of(output="head").described()
    assert TrainConfig.of(**{"output": "head", **elsewhere}).described() == usual
    assert not elsewhere.keys() & usual.keys()
    assert TrainConfig.of(output="head", learning_rate=0.5).described() != usual


def test_settings_keep_the_order_of_the_help():
    assert list(TrainConfig.model_fields) == [name for names in GROUPS.values() for name in names]


def test_what_is_written_as_yaml_is_read_as_the_same_settings(tmp_path):
    config = TrainConfig.of(
        output=Path("head"), principle="Sé cálido.=0.5", model_kwargs={"n_ctx": 512}, judge="length", overwrite=True
    )
    (tmp_path / "train.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert TrainConfig.of(**read_settings(tmp_path / "train.yaml")) == config.updated(overwrite=False)


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("rloo", {"rounds": 1}, []),
        ("rloo", {}, []),
        ("principle", {"rounds": 1}, []),
        (
            "value",
            {"rounds": 1},
            ["rounds=1 has no influence: method 'value' does not take it; rloo, reward-model, pr"],
        ),
        ("value", {"contrast": "both"}, ["'value' does not take it; principle and teacher do"]),
        ("rule", {"correction_rounds": 0}, []),
        ("dpo", {"beta": 0.3, "correction_rounds": 1}, []),  # as they are anyway
        ("value", {"beta": 0.1, "credit": "prefix"}, ["beta=0.1 has", "method 'value' does not take it; sac does"]),
    ],
)
def test_settings_that_the_method_does_not_take_are_told(method, settings, said):
    told = TrainConfig.of(output="head", **settings).without_influence(method)
    assert len(told) == len(said)
    assert all(part in sentence for part, sentence in zip(said, told, strict=True))


def test_settings_of_single_methods_name_methods():
    taken = [mark for field in MethodSettings.model_fields.values() for mark in field.metadata if type(mark) is TakenBy]
    assert len(taken) == len(MethodSettings.model_fields)
    assert {method for mark in taken for method in mark.methods} <= set(METHODS)
