"""Rows and rewards as Python objects: the head is that of the same rows in a file, bit for bit."""

from __future__ import annotations

import json

import pytest

from mara_integrations import TrainConfig, train
from mara_integrations.rewards import load_reward

PROMPTS = [{"prompt": f"{i} {chr(97 + i % 26)}?"} for i in range(24)]
PAIRS = [{"prompt": f"{i}?", "chosen": f"aeio u{i}a", "rejected": f"bcdf g{i}k"} for i in range(24)]
VOWELS = "tests/reward_for_tests.py:vowels"


@pytest.fixture
def trained(folder_model, tmp_path):
    """Trains a tiny head; returns the fingerprint of its weights."""

    def trained(name, *, model=folder_model, **given):
        objects = {name: given.pop(name) for name in ("data", "judge") if name in given}
        if callable(given.get("reward")):
            objects["reward"] = given.pop("reward")
        small = {"max_reply_tokens": 6, "epochs": 2, "inner_size": 16, "eval_prompts": 2, "max_replies": 16}
        if "file" in given:
            given["data"] = given.pop("file")
        if isinstance(model, str):
            given["model"] = model
        else:
            objects["model"] = model
        return train(TrainConfig.of(output=tmp_path / name, **small | given), **objects).head.fingerprint

    return trained


def in_a_file(folder, rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def as_data_set(rows):
    return pytest.importorskip("datasets", reason="needs the data extra").Dataset.from_list(rows)


def test_prompts_and_a_reward_function_train_the_head_that_their_names_train(trained, tmp_path):
    by_name = trained("file", file=in_a_file(tmp_path, PROMPTS), reward=VOWELS, partial_text=True, rounds=0)
    function = load_reward(VOWELS)
    assert trained("rows", data=PROMPTS, reward=function, partial_text=True, rounds=0) == by_name


@pytest.mark.parametrize("form", [list, as_data_set], ids=["dicts", "datasets.Dataset"])
def test_pairs_train_the_head_that_their_file_trains(trained, tmp_path, form):
    by_name = trained("file", file=in_a_file(tmp_path, PAIRS), method="dpo", form="q")
    assert trained("rows", data=form(PAIRS), method="dpo", form="q", judge=load_reward(VOWELS)) == by_name


def test_a_loaded_model_trains_the_head_that_its_folder_trains(trained, folder_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(folder_model), AutoTokenizer.from_pretrained(folder_model)
    by_name = trained("file", file=in_a_file(tmp_path, PAIRS), method="value")
    assert trained("loaded", model=loaded, data=PAIRS, method="value") == by_name
