"""The recipes for training, run as they are, on a tiny model."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import llama_index.core
import pytest

from mara_integrations.heads.head import MARAHead
from mara_integrations.testing import tiny_model, tiny_tokenizer

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


@pytest.mark.usefixtures("event_loop")
def test_questions_and_passages_become_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_index.retrievers.bm25")
    monkeypatch.setattr(llama_index.core, "global_tokenizer", None)
    tiny_model(max_position_embeddings=2048).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    recipe = runpy.run_path(str(COOKBOOK / "12_answers_from_documents.py"))
    small = {"max_reply_tokens": 6, "epochs": 1, "inner_size": 16, "eval_prompts": 4, "max_replies": 16}

    result = recipe["main"](str(tmp_path / "head"), model=str(tmp_path / "tiny"), **small)

    assert len(result["answers"]) == 2
    assert all({"answered", "admitted"} == row["judges"].keys() for row in result["table"]["rows"])
    config = MARAHead.from_pretrained(tmp_path / "head").config
    assert config.method == "grounding" and config.training["context_template"] == recipe["TEMPLATE"]


def test_a_rubric_becomes_a_head(folder_model: str, tmp_path: Path) -> None:
    recipe = runpy.run_path(str(COOKBOOK / "10_a_judge_as_reward.py"))
    small = {"max_reply_tokens": 6, "epochs": 1, "inner_size": 16, "eval_prompts": 2, "max_replies": 16, "rounds": 0}

    result = recipe["main"](str(tmp_path / "head"), model=folder_model, **small)

    assert list(result["scores"]) == ["judge my-judge", "length"] and 0 < result["calls"] < 60
    config = MARAHead.from_pretrained(tmp_path / "head").config
    assert config.rewards[0]["rubric"] == recipe["RUBRIC"].strip()
