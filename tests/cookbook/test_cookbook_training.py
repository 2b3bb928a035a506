"""The recipes for training, run as they are, on a tiny model."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from mara_integrations.heads.head import MARAHead

COOKBOOK = Path(__file__).parents[2] / "cookbook"


def test_a_sentence_becomes_a_head(
    folder_model: str, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = runpy.run_path(str(COOKBOOK / "09_from_a_sentence_to_a_head.py"))
    small = {"max_reply_tokens": 6, "epochs": 1, "inner_size": 16, "eval_prompts": 2, "max_replies": 16}

    result = recipe["main"](str(tmp_path / "head"), model=folder_model, data=prompts_file, **small)

    assert len(result["table"]["rows"]) == 8 and json.dumps(result["table"])
    assert set(result["answers"]) == {0.0, 1.0}
    config = MARAHead.from_pretrained(tmp_path / "head").config
    assert (config.principle, config.against) == (recipe["SENTENCE"], recipe["OPPOSITE"])
    assert "Beside the prompt" in capsys.readouterr().out


def test_most_of_a_system_prompt_becomes_a_head(
    folder_model: str, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = runpy.run_path(str(COOKBOOK / "11_distil_your_system_prompt.py"))
    small = {"max_reply_tokens": 6, "epochs": 1, "inner_size": 16, "eval_prompts": 2, "max_replies": 16}

    result = recipe["main"](str(tmp_path / "head"), model=folder_model, data=prompts_file, **small)

    config = MARAHead.from_pretrained(tmp_path / "head").config
    assert (config.principle, config.system_prompt) == (recipe["MANNER"], recipe["FACTS"])
    saved = result["prompt_tokens"]["whole prompt"] - result["prompt_tokens"]["facts and head"]
    assert saved >= len(recipe["MANNER"]), "a token of the tiny model is a byte"
    assert len(result["table"]["rows"]) == 8 and "facts and head, " in capsys.readouterr().out


def test_a_rubric_becomes_a_head(folder_model: str, tmp_path: Path) -> None:
    recipe = runpy.run_path(str(COOKBOOK / "10_a_judge_as_reward.py"))
    small = {"max_reply_tokens": 6, "epochs": 1, "inner_size": 16, "eval_prompts": 2, "max_replies": 16, "rounds": 0}

    result = recipe["main"](str(tmp_path / "head"), model=folder_model, **small)

    assert list(result["scores"]) == ["judge my-judge", "length"] and 0 < result["calls"] < 60
    config = MARAHead.from_pretrained(tmp_path / "head").config
    assert config.rewards[0]["rubric"] == recipe["RUBRIC"].strip()
