"""A dry run counts the replies that the run will write."""

from __future__ import annotations

import json
import string

import pytest

from mara_integrations.training.config import TrainConfig
from mara_integrations.training.dry_run import dry_run
from mara_integrations.training.rollouts.workers import LocalWorker
from mara_integrations.training.run import train

VOWELS = "tests/reward_for_tests.py:vowels"


@pytest.mark.parametrize(
    "how",
    [
        {"reward": VOWELS, "partial_text": True},
        {"reward": VOWELS, "max_replies": 48, "rounds": 1},
        {"reward": VOWELS, "method": "value"},
        {"reward": VOWELS, "method": "sac", "max_replies": 192},
        {"forbid": tuple(string.punctuation)},
        {"method": "reward-model"},
    ],
    ids=["parts", "whole replies", "value", "sac", "rule", "reward model"],
)
def test_it_counts_the_replies_that_will_be_written(folder_model, prompts_file, tmp_path, how, monkeypatch):
    if "reward" not in how and "forbid" not in how:
        pair = {"chosen": "so it was", "rejected": "then and"}
        rows = [{"prompt": f"{i}?", **pair} for i in range(100)]
        prompts_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {"max_reply_tokens": 6, "epochs": 1, "inner_size": 16, "eval_prompts": 0, "max_replies": 16}
    config = TrainConfig.of(model=folder_model, data=prompts_file, output=tmp_path / "h", **{**small, **how})
    expected = dry_run(config).replies
    assert not (tmp_path / "h").exists()
    written, submit = [], LocalWorker.submit

    def count(workers, batch, on_reply):
        written.append(len(batch.prompts) * batch.replies_per_prompt)
        return submit(workers, batch, on_reply)

    monkeypatch.setattr(LocalWorker, "submit", count)
    train(config)
    assert sum(written) == expected
