"""`rloo`: its objectives follow their laws, a planted preference is found, and nothing that was gathered is lost."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.gate import gated_log_probs, kl_to_base
from mara_integrations.errors import DataError, OutputError
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Message
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.learning.objectives import (
    clipped_policy_loss,
    discounted_returns,
    look_ahead_advantages,
)
from mara_integrations.training.methods import reward_rounds
from mara_integrations.training.methods.rloo import Episodes, ResidualLearner
from mara_integrations.training.records import store
from mara_integrations.training.rollouts import workers
from mara_integrations.training.rollouts.decisions import Decisions, decisions_of, taken_rank
from mara_integrations.training.rollouts.replies import sample_replies
from mara_integrations.training.run import train
from mara_integrations.training.scoring.scale import decisions_kl, scale_on_decisions


def settings(folder_model, prompts_file, output, **values):
    small = {"max_reply_tokens": 6, "epochs": 2, "inner_size": 16, "eval_prompts": 2, "max_replies": 24, "rounds": 1}
    named = {"reward": "tests/reward_for_tests.py:vowels", "partial_text": True, "form": "residual"}
    return TrainConfig.of(model=folder_model, data=prompts_file, output=output, **{**small, **named, **values})


# --- objectives ---


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=12), st.floats(0.0, 1.0))
def test_returns_are_discounted_sums_of_what_follows(gains, gamma):
    returns = discounted_returns(torch.tensor(gains, dtype=torch.float64), gamma)
    brute = [sum(gamma ** (u - t) * gains[u] for u in range(t, len(gains))) for t in range(len(gains))]
    assert returns.tolist() == pytest.approx(brute, abs=1e-9)


def test_gains_of_prefixes_add_up_to_the_worth_of_the_whole():
    worths = torch.tensor([0.3, 0.1, 0.4, 1.0])
    assert float(discounted_returns(worths.diff(), 1.0)[0]) == pytest.approx(0.7)


def test_with_the_true_critic_an_average_candidate_has_no_advantage():
    """Three candidates, drawn as the gate draws them: the mean advantage of the one taken is 0."""
    log_probs = gated_log_probs(torch.tensor([[0.3, -0.4, 9.0]]), torch.ones(1, 3, dtype=torch.bool))[0]
    gains, after, gamma = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.1, 0.7, -0.2]), 0.9
    worth = gains + gamma * after
    before = (log_probs.exp() * worth).sum().expand(3)
    looked = look_ahead_advantages(
        torch.zeros(3, dtype=torch.bool), torch.full((3,), 99.0), gains, before, after, gamma
    )
    taken = look_ahead_advantages(torch.ones(3, dtype=torch.bool), worth, gains * 99, before, after, gamma)
    assert float((log_probs.exp() * looked).sum()) == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(looked, taken)


@given(st.floats(-1, 1), st.floats(-3, 3))
def test_a_token_beyond_the_clip_is_pushed_no_further(log_ratio, advantage):
    at = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    loss = clipped_policy_loss(at, torch.tensor([advantage], dtype=torch.float64), 0.3)
    loss.backward()
    ratio = math.exp(log_ratio)
    is_beyond = (advantage > 0 and ratio > 1.3) or (advantage < 0 and ratio < 0.7)
    assert float(loss.detach()) == pytest.approx(-min(ratio * advantage, min(max(ratio, 0.7), 1.3) * advantage))
    assert float(at.grad) == pytest.approx(0.0 if is_beyond else -ratio * advantage)


def test_the_gradient_of_episodes_is_that_of_the_gate_s_likelihood():
    """At the gate that wrote them: -advantage * d log pi / df, log pi by the gate's own function."""
    hazards = torch.tensor([0.2, -0.5, 1.0, 0.7], dtype=torch.float64)
    accepted = torch.tensor([False, False, True, True])
    states, tokens = torch.zeros(4, 1), torch.tensor([0, 0, 0, 1])
    decisions = Decisions(states, hazards, accepted, tokens, torch.tensor([4]))
    episodes = Episodes(decisions, torch.tensor([1.5]), torch.zeros(4, dtype=torch.float64))
    f = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    episodes.loss(f, 1.0).backward()
    g = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    padded = torch.cat([hazards[:3] + g[:3], torch.zeros(1, dtype=torch.float64)])[None]  # one more, never visited
    first = gated_log_probs(padded, torch.ones(1, 4, dtype=torch.bool))[0, 2]
    second = gated_log_probs(torch.stack([hazards[3] + g[3], g[0] * 0])[None], torch.ones(1, 2, dtype=torch.bool))[0, 0]
    (-1.5 * (first + second) / 2).backward()
    torch.testing.assert_close(f.grad, g.grad)


@given(st.integers(0, 50))
def test_kl_from_visited_candidates_is_the_gate_s_kl(seed):
    """Summed over all ways a position can go, each as often as the base model goes it."""
    generator = torch.Generator().manual_seed(seed)
    hazards, f = torch.randn(2, 4, generator=generator)
    live, scale = torch.ones(1, 4, dtype=torch.bool), 0.7
    expected = float(kl_to_base((hazards + scale * f)[None], hazards[None], live))
    found = 0.0
    for taken, log_prob in enumerate(gated_log_probs(hazards[None], live)[0].tolist()):
        asked = min(taken + 1, 3)  # the last one is taken unasked
        accepted = torch.arange(asked) == taken
        one = Decisions(
            torch.zeros(asked, 1),
            hazards[:asked],
            accepted,
            torch.zeros(asked, dtype=torch.long),
            torch.tensor([asked]),
        )
        found += math.exp(log_prob) * decisions_kl(one, f[:asked], scale)
    assert found == pytest.approx(expected, abs=1e-5)
    again = decisions_kl(one, f[:asked], scale, sampled_at=scale)
    assert again >= 0 and decisions_kl(one, f[:asked], 0.0) == pytest.approx(0.0, abs=1e-6)


def test_the_scale_found_on_decisions_spends_the_budget():
    model = load_model(ModelSpec((tiny_model(), tiny_tokenizer())))
    untrained = MARAHead(random_head(32, "residual").config).eval()
    replies = sample_replies(
        model, Decoder(make_backend(model.model)), [(Message("user", c),) for c in "abcd"],
        sampling=SamplingParams(max_new_tokens=10, temperature=1.0), head=untrained, keep_positions=True,
    )  # fmt: skip
    decisions, num_tokens = decisions_of(replies), sum(len(reply.token_ids) for reply in replies)
    scores = torch.randn(len(decisions.states), generator=torch.Generator().manual_seed(0))
    scale = scale_on_decisions(decisions, scores, 0.05, num_tokens)
    assert decisions_kl(decisions, scores, scale) / num_tokens == pytest.approx(0.05, rel=0.01)
    assert all(taken_rank(reply, p) < len(p.token_ids) for reply in replies for p in reply.positions)


# --- whole runs ---

LEARNING = {
    "max_replies": 60,
    "max_reply_tokens": 10,
    "epochs": 5,
    "learning_rate": 2e-3,
    "batch_size": 80,
    "inner_size": 32,
    "kl_budget": 0.5,
    "eval_prompts": 0,
}


@pytest.mark.parametrize(
    "how", [{"partial_text": True}, {"max_replies": 120, "replies_each": 6, "epochs": 10, "batch_size": 40}]
)
def test_what_the_reward_likes_is_written_more_often(folder_model, prompts_file, tmp_path, how):
    result = train(settings(folder_model, prompts_file, tmp_path / "h", **{**LEARNING, "partial_text": False, **how}))
    lines = [json.loads(line) for line in (tmp_path / "h" / "metrics.jsonl").read_text().splitlines()]
    judged = [line for line in lines if line["event"] == "held-out comparison"]
    assert [line["stage"] for line in judged] == ["round 1", "round 2"]
    best = max(line["rewards"]["vowels"]["difference"]["mean"] for line in judged)
    assert best > 0.01, "of some 0.03 vowels a character"
    assert result.head.config.form == "residual" and result.kl_per_token < 1.0
    assert all(line["candidates_per_token"] >= 1.0 for line in judged)


def test_a_judge_is_asked_about_held_out_replies_and_teaches_nothing(folder_model, prompts_file, tmp_path):
    alone = train(settings(folder_model, prompts_file, tmp_path / "alone", eval_prompts=0))
    judge = "tests/reward_for_tests.py:brevity"
    judged = train(settings(folder_model, prompts_file, tmp_path / "judged", judge=judge))
    assert judged.head.fingerprint == alone.head.fingerprint
    lines = [json.loads(line) for line in (tmp_path / "judged" / "metrics.jsonl").read_text().splitlines()]
    assert {tuple(line["rewards"]) for line in lines if line["event"] == "held-out comparison"} == {
        ("vowels", "brevity")
    }
    assert list(judged.evaluation.rewards) == ["vowels", "brevity"]


def test_a_judge_does_not_choose_among_rounds_even_where_the_reward_has_no_opinion(
    folder_model, prompts_file, tmp_path, monkeypatch
):
    first = train(settings(folder_model, prompts_file, tmp_path / "first", rounds=0, eval_prompts=0))
    compare = reward_rounds.compare_held_out

    def of_judges_alone(*arguments):
        comparison = compare(*arguments)
        del comparison.rewards["vowels"]
        return comparison

    monkeypatch.setattr(reward_rounds, "compare_held_out", of_judges_alone)
    judge = "tests/reward_for_tests.py:brevity"
    judged = train(settings(folder_model, prompts_file, tmp_path / "judged", rounds=2, eval_prompts=0, judge=judge))
    assert judged.head.fingerprint == first.head.fingerprint, "no round can be told to have helped"


def test_a_judge_of_the_rewards_name_takes_nothing_from_it(folder_model, prompts_file, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rewards.py").write_text(
        "def vowels(completions, **_):\n    return [0.5] * len(completions)\n"
    )
    judge = f"{tmp_path / 'other' / 'rewards.py'}:vowels"
    result = train(settings(folder_model, prompts_file, tmp_path / "h", rounds=0, judge=(judge, judge)))
    assert list(result.evaluation.rewards) == ["vowels", "vowels (judge)", "vowels (judge) 2"]
    assert result.evaluation.rewards["vowels"].base_mean != 0.5


def test_rounds_end_where_one_did_not_help_and_the_head_is_as_before(folder_model, prompts_file, tmp_path, monkeypatch):
    fits, fit_parts = [], ResidualLearner.fit_parts

    def spoil(learner, name, fitting, checking):
        if fits:
            with torch.no_grad():
                learner.head.output_linear.bias += 3.0  # of no use: all candidates alike
                learner.head.output_linear.weight.zero_()
        else:
            fit_parts(learner, name, fitting, checking)
        fits.append(learner.head.fingerprint)

    monkeypatch.setattr(ResidualLearner, "fit_parts", spoil)
    result = train(settings(folder_model, prompts_file, tmp_path / "h", rounds=5, **LEARNING))
    assert len(fits) == 2, "of six"
    assert result.head.fingerprint == fits[0]


def test_few_prompts_get_several_replies_each(folder_model, prompts_file, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(prompts_file.read_text().splitlines(keepends=True)[:12]))
    train(settings(folder_model, few, tmp_path / "h", max_replies=40, rounds=0, eval_prompts=0))
    lines = [json.loads(line) for line in (tmp_path / "h" / "metrics.jsonl").read_text().splitlines()]
    base = next(line for line in lines if line["event"] == "rewards" and line["stage"] == "base replies")
    assert base["replies"] == 40, "10 prompts, 4 to each"


def test_replies_without_an_opinion_teach_nothing_and_are_not_judged(folder_model, prompts_file, tmp_path):
    undecided = {"reward": "tests/reward_for_tests.py:undecided", "rounds": 0}
    train(settings(folder_model, prompts_file, tmp_path / "h", **undecided))
    lines = [json.loads(line) for line in (tmp_path / "h" / "metrics.jsonl").read_text().splitlines()]
    rewards = {line["stage"]: line for line in lines if line["event"] == "rewards"}
    assert 0 < rewards["base replies"]["scored"] < rewards["base replies"]["replies"]
    assert "undecided" in next(line for line in lines if line["event"] == "held-out comparison")["rewards"]


def test_a_reward_that_tells_nothing_apart_is_refused(folder_model, prompts_file, tmp_path):
    with pytest.raises(DataError, match=r"gave every reply 1\.0"):
        train(settings(folder_model, prompts_file, tmp_path / "h", reward="tests/reward_for_tests.py:constant"))


def test_one_bank_serves_every_reward(folder_model, prompts_file, tmp_path, monkeypatch):
    alone = {"rounds": 0, "eval_prompts": 0}
    train(settings(folder_model, prompts_file, tmp_path / "a", **alone))
    written = []
    monkeypatch.setattr(workers, "sample_replies", lambda *a, **k: written.append(1) or sample_replies(*a, **k))
    train(settings(folder_model, prompts_file, tmp_path / "b", reward="tests/reward_for_tests.py:brevity", **alone))
    assert len(written) == 2, "two short replies to try the reward, and the gated ones it is judged by"


# --- never lost ---


def test_a_run_that_filled_the_disk_goes_on_when_there_is_room(folder_model, prompts_file, tmp_path, monkeypatch):
    small = {"rounds": 0, "eval_prompts": 0}
    whole = train(settings(folder_model, prompts_file, tmp_path / "whole", **small))
    shutil.rmtree(store.cache_dir())
    replace = os.replace

    for file in ("replies", "rewards-of-base-replies.pt", "head.safetensors"):

        def full(source, target, file=file):
            if file in Path(target).parts:
                raise OSError(28, "No space left on device")
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(OutputError, match=rf"{file}.*No space left on device"):
                train(settings(folder_model, prompts_file, tmp_path / "head", **small))
        assert not list(tmp_path.rglob(".*.pt.*")), "nothing half-written is left"

    resumed = train(settings(folder_model, prompts_file, tmp_path / "head", **small))
    assert resumed.head.fingerprint == whole.head.fingerprint
