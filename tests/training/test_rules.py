"""Trainings under rules beyond words: patterns, ready rules, and what must appear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mara_integrations.errors import ConfigError, MaraError
from mara_integrations.heads.head import MARAHead
from mara_integrations.rewards import reward_from_spec, reward_name
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.plan import make_plan
from mara_integrations.training.run import train


@pytest.fixture
def config(folder_model: str, prompts_file: Path, tmp_path: Path) -> Any:
    small = {"max_reply_tokens": 6, "epochs": 2, "inner_size": 16, "eval_prompts": 4, "max_replies": 16}

    def config(**how: Any) -> TrainConfig:
        given = {"model": folder_model, "data": prompts_file, "output": tmp_path / "head"}
        return TrainConfig.of(**{**given, **small, **how})

    return config


@pytest.mark.parametrize("form", ["q", "residual"])
def test_a_pattern_and_a_ready_rule_train_a_head_together(config: Any, tmp_path: Path, form: str) -> None:
    result = train(config(forbid=["re:[!-5]", "rule:markdown", "x*"], form=form))
    assert result.evaluation is not None and list(result.evaluation.rewards) == ["without re:[!-5], rule:markdown, x*"]
    spec = MARAHead.from_pretrained(tmp_path / "head").config.rewards[0]
    assert reward_name(reward_from_spec(spec)) == "without re:[!-5], rule:markdown, x*"


def test_what_must_appear_is_learned_as_a_reward_and_what_must_not_beside_it(config: Any) -> None:
    plan = make_plan(config(require=["re:[a-z]"], forbid=["e"]))
    assert (plan.method.name, plan.rule) == ("rloo", None) and plan.reward is not None
    assert reward_name(plan.reward) == "without e + with re:[a-z]"
    assert train(config(require=["re:[a-z]"], forbid=["e"])).evaluation is not None


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"forbid": ["re:["]}, "is not a regular expression"),
        ({"require": ["rule:mail"]}, "rule 'mail' is unknown"),
        ({"require": [" "]}, "forbidden words"),
        ({"forbid": ["x"], "require": ["y"], "method": "rule"}, "method 'rule' needs a rule"),
    ],
)
def test_a_wrong_rule_is_refused_before_anything_is_loaded(config: Any, setting: Any, said: str) -> None:
    with pytest.raises(MaraError) as caught:
        make_plan(config(model="absent", **setting))
    assert said in caught.value.message and isinstance(caught.value, ConfigError | ValueError)
