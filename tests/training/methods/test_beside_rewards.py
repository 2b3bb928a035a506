"""A sentence and rewards in one training: what each says of the candidates is added, by weight."""

from __future__ import annotations

import json

import pytest
import torch

from mara_integrations.errors import ConfigError, DataError
from mara_integrations.progress import Reporter
from mara_integrations.testing import tiny_model, tiny_tokenizer
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import limited_prompts
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.identity import Identity
from mara_integrations.training.methods.beside_rewards import with_rewards
from mara_integrations.training.methods.readings import Side
from mara_integrations.training.plan import make_plan
from mara_integrations.training.run import start, train

SMALL = {"max_reply_tokens": 6, "epochs": 2, "inner_size": 16, "eval_prompts": 2, "max_replies": 16}
REWARDS = "tests/reward_for_tests.py"
LEARNED = {"reward": f"{REWARDS}:vowels", "partial_text": True}


@pytest.fixture
def files(tmp_path, folder_model):
    rows = [{"prompt": f"{i} {chr(97 + i % 26)}?"} for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def config(files, name="head", **settings):
    named = {"model": str(files / "tiny"), "data": files / "prompts.jsonl", "principle": "Be kind."}
    return TrainConfig.of(**{**named, "output": files / name, **SMALL, **LEARNED, **settings})


def test_an_interrupted_run_ends_with_the_head_of_an_uninterrupted_one(files, interrupting):
    whole = train(config(files, "whole")).head
    with pytest.raises(KeyboardInterrupt):
        train(config(files, "cut"), reporter=interrupting("fit 1", 1))

    train(config(files, "cut"))

    weights = [(files / name / "head.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert (whole.config.method, whole.config.principle) == ("principle", "Be kind.")
    assert whole.config.rewards[0]["path"].endswith("vowels") and "vowels" in whole.config.metrics["contrast"]
    assert all("vowels" in row["judges"] for row in whole.config.metrics["prompt_baseline"]["rows"])
    assert "and what raises vowels" in (files / "whole" / "README.md").read_text()


def sides_of(run):
    untrained, sides = run.new_head().eval(), []
    for name, data in (("base replies", run.plan.train), ("held-out base replies", run.plan.held_out)):
        prompts = limited_prompts(run, data)
        sides.append(Side.of(name, prompts, generate_replies(run, name, prompts, 1, 0, untrained, is_base=True)))
    return sides


def test_each_counts_in_standard_deviations_and_by_its_weight(files):
    def summed(sign, **settings):
        chosen = config(files, **settings)
        plan = make_plan(chosen)
        run = start(chosen, plan, Identity.of(chosen, plan), Reporter())
        sides = sides_of(run)
        contrasts = [sign * side.positions.token_ids.float().masked_fill(~side.positions.live, 0.0) for side in sides]
        with run.logging():
            positions, sums = with_rewards(run, "fit 1", sides, contrasts)
        return positions[0], sums[0]

    positions, alone = summed(0.0)
    _, half = summed(0.0, reward=f"{REWARDS}:vowels=0.5")
    _, both = summed(1.0)

    live = positions.live
    assert float(alone[live].std()) == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(half, 0.5 * alone)
    contrast = (both - alone)[live]
    of_tokens = positions.token_ids.float()
    mean = (positions.log_probs.softmax(-1) * of_tokens).sum(-1, keepdim=True)
    torch.testing.assert_close(contrast, (of_tokens - mean)[live], atol=1e-3, rtol=1e-4)


def test_replies_without_an_opinion_learn_from_the_sentence_alone(files):
    head = train(config(files, reward=f"{REWARDS}:undecided", eval_prompts=0)).head

    assert all(tensor.isfinite().all() for tensor in head.state_dict().values())


def test_a_teacher_is_learned_from_beside_a_reward_too(files):
    tiny_model(seed=1).save_pretrained(files / "tuned")
    tiny_tokenizer().save_pretrained(files / "tuned")
    plan = make_plan(config(files, principle=(), teacher=str(files / "tuned")))

    assert plan.method.name == "teacher" and plan.learns_from_reward


def test_a_reward_of_whole_replies_is_refused_by_name(files):
    with pytest.raises(ConfigError, match="reward 'vowels' scores whole replies, and a principle") as caught:
        make_plan(config(files, partial_text=None))

    assert "--head A --head B" in caught.value.hint and "--judge" in caught.value.hint


def test_a_reward_that_is_the_same_for_all_replies_is_refused(files):
    with pytest.raises(DataError, match="nothing to learn from"):
        train(config(files, reward=f"{REWARDS}:constant"))
