"""The reproduction of the paper's code follows its quirks, and trains a head from end to end."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.scheduler import Scheduler
from mara_integrations.errors import ConfigError
from mara_integrations.messages import Message
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.methods.sac import Rollout
from mara_integrations.training.rollouts.decisions import decisions_of
from mara_integrations.training.rollouts.replies import sample_replies

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import published_sac


@pytest.fixture(scope="module")
def rollouts():
    model = load_model(ModelSpec((tiny_model(), tiny_tokenizer())))
    head = random_head(32, "paper", accept_rate=0.3)
    wide = Decoder(make_backend(model.model), Scheduler(feeds_all=True))  # feeds all candidates
    sampling = SamplingParams(max_new_tokens=8, top_k=6)
    prompts = [(Message("user", text),) for text in "abcd"]
    gate = GateParams(selection="sample")
    return head, sample_replies(model, wide, prompts, sampling=sampling, head=head, gate=gate, keep_positions=True)


def test_the_published_kl_is_that_of_the_code(rollouts):
    head, replies = rollouts
    got, want, exact = published_sac.published_kl(head, replies, 0.1).tolist(), [], []
    for reply in replies:
        for position in reply.positions:
            accept = torch.sigmoid(head.score(position.states, position.states))
            pi, remaining = [], 1.0
            for a in accept.tolist():  # the code's own words: the last one is not forced
                pi.append(remaining * a)
                remaining *= 1 - a
            hazards = torch.tensor(position.hazard_logits).sigmoid().tolist()
            p, left = [], 1.0
            for k, h in enumerate(hazards):
                p.append(left * (h if k < len(hazards) - 1 else 1.0))
                left *= 1 - h
            visited = position.token_ids.index(reply.token_ids[position.index]) + 1
            log_probs = torch.tensor(pi).log_softmax(0).tolist()
            want += [-0.1 * (log_probs[k] - math.log(p[k]) / 0.8) for k in range(visited)]
            exact += [visited == len(pi)] * visited
    assert len(got) == len(want) and any(exact) and not all(exact)
    for g, w, is_exact in zip(got, want, exact, strict=True):
        assert g == pytest.approx(w, abs=1e-4 if is_exact else 0.1 * math.log((1 + math.e) / 2))


def test_the_last_candidate_counts_as_a_decision(rollouts):
    _, replies = rollouts
    usual, published = decisions_of(replies), decisions_of(replies, include_forced=True)
    forced = sum(p.token_ids[-1] == r.token_ids[p.index] for r in replies for p in r.positions)
    assert forced > 0 and len(published.states) == len(usual.states) + forced
    assert int(published.accepted.sum()) == int(usual.accepted.sum()) + forced


def test_the_first_decision_of_several_gets_nothing_of_what_is_posted_back(rollouts, monkeypatch):
    head, replies = rollouts
    decisions = decisions_of(replies, include_forced=True)
    monkeypatch.setattr(published_sac, "published_kl", lambda *_: torch.zeros(len(decisions.states)))
    rollout = Rollout(head, [], replies, [1.0] * len(replies), decisions)
    credit = published_sac.published_credit(None, published_sac.PUBLISHED, rollout)
    for of_reply in credit.split(decisions.counts.tolist()):
        assert float(of_reply[0]) == (0.0 if len(of_reply) > 1 else 1.0)
        assert float(of_reply[-1]) == 1.0, "the last one gets the reward itself"


def test_a_head_is_trained_from_end_to_end(folder_model, prompts_file, tmp_path, monkeypatch):
    small = {"max_replies": 128, "max_reply_tokens": 6, "inner_size": 32, "eval_prompts": 0}
    named = {"model": folder_model, "data": prompts_file, "reward": "tests/reward_for_tests.py:vowels"}
    config = TrainConfig.of(output=tmp_path / "head", **named, **small)
    with pytest.raises(ConfigError, match=r"max_replies=128 is not enough.*65536 decisions"):
        published_sac.train_published(config)
    monkeypatch.setattr(
        published_sac, "PUBLISHED", replace(published_sac.PUBLISHED, batch_size=32, warmup=500, updates=1)
    )

    result = published_sac.train_published(config)

    assert result.head.config.form == "paper" and result.head.config.scale == 1.0
    events = [json.loads(line) for line in (tmp_path / "head" / "metrics.jsonl").read_text().splitlines()]
    assert [event["alpha"] < 0.02 for event in events if event["event"] == "round"][-1]
