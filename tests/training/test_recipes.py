"""The shipped recipes: each is a run that can start, named in the head, and gives way to what a user says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mara_integrations.errors import ConfigError
from mara_integrations.heads.head import MARAHead
from mara_integrations.rewards import parse_reward, reward_name
from mara_integrations.training.config import TrainConfig, read_settings
from mara_integrations.training.inputs import Inputs
from mara_integrations.training.plan import make_plan
from mara_integrations.training.recipes import read_recipe, recipe_names
from mara_integrations.training.run import train

SMALL = {"max_reply_tokens": 6, "epochs": 1, "inner_size": 16, "eval_prompts": 2, "max_replies": 12}


def test_there_is_one_for_each_common_wish() -> None:
    assert recipe_names() == ["concise", "formal", "from-context", "no-flattery", "no-pii", "refuse-harm", "warm"]


@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "from-context"])
def test_each_is_a_run_judged_by_what_training_does_not_see(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(name)
    plan = make_plan(TrainConfig.of(output=tmp_path / "head", recipe=name))

    assert len(plan.train) + len(plan.held_out) >= 64 and plan.judges
    assert plan.method.name == ("rule" if name == "no-pii" else "principle")
    learned = [reward for reward in (plan.rule, plan.reward) if reward is not None]
    assert not {reward_name(judge) for judge in plan.judges.values()} & {reward_name(reward) for reward in learned}
    assert recipe.description.endswith(".") and recipe.judged and len(recipe.system_prompt) > 30


def test_that_for_documents_needs_them_and_has_the_sentence_of_its_method(tmp_path: Path) -> None:
    config = TrainConfig.of(output=tmp_path / "head", recipe="from-context")
    with pytest.raises(ConfigError, match="there is no data"):
        make_plan(config)
    rows = [{"prompt": f"{i}?", "context": f"The word of {i} is {i % 7}."} for i in range(40)]
    plan = make_plan(config, Inputs(data=rows))
    assert plan.method.name == "grounding" and plan.principle is not None
    assert plan.principle.text == read_recipe("from-context").system_prompt


def test_what_it_shows_is_a_file_of_the_same_settings(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    for name in recipe_names():
        file.write_text(read_recipe(name).to_yaml(), encoding="utf-8")
        by_name = TrainConfig.of(output="head", recipe=name)
        assert TrainConfig.of(output="head", **read_settings(file)) == by_name.model_copy(update={"recipe": None})


def test_what_is_given_stands_above_it() -> None:
    usual = TrainConfig.of(output="head", recipe="warm")
    changed = TrainConfig.of(output="head", recipe="warm", judge="length", seed=3, contrast="neutral")
    assert (changed.judge, changed.seed, changed.contrast) == (("length",), 3, "neutral")
    assert changed.principle == usual.principle and changed.updated(seed=4).judge == ("length",)


def test_another_sentence_replaces_its_opposite_too() -> None:
    assert TrainConfig.of(output="head", recipe="warm").against is not None
    other = TrainConfig.of(output="head", recipe="warm", principle="Be brief.")
    assert (other.principle, other.against, other.judge) == (("Be brief.",), None, ("sentiment",))


def test_one_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"recipe='wram' is unknown \(hint: recipes are concise, .*, warm\)"):
        TrainConfig.of(output="head", recipe="wram")


def test_the_head_and_its_card_name_it(folder_model: str, prompts_file: Path, tmp_path: Path) -> None:
    config = TrainConfig.of(output=tmp_path / "head", recipe="formal", model=folder_model, data=prompts_file, **SMALL)

    train(config)

    head = MARAHead.from_pretrained(tmp_path / "head").config
    assert head.training["recipe"] == "formal" and head.principle == read_recipe("formal").system_prompt
    assert head.origin is not None and head.origin.command.startswith("mara-tools train --model tiny --data prompts.")
    assert "--recipe formal" in head.origin.command and "--principle" not in head.origin.command
    assert "recipe `formal`" in (tmp_path / "head" / "README.md").read_text(encoding="utf-8")
    judges = head.metrics["prompt_baseline"]["rows"][0]["judges"]
    assert list(judges) == [reward_name(parse_reward("no-informal")[0])]
    again = TrainConfig.of(**{**read_settings(tmp_path / "head" / "train.yaml"), "output": tmp_path / "head"})
    assert train(again).was_finished, "the settings it leaves are those it had"
    assert json.dumps(head.training)
