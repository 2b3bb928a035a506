"""Objectives: a reply's likelihood under the gate, its distance from the base model, and the losses built on them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.engine.gate import gated_log_probs, kl_to_base
from mara_integrations.training.learning.objectives import (
    decision_kl,
    decision_log_probs,
    dpo_loss,
    kto_loss,
    reply_log_ratios,
)

logits = st.lists(st.floats(-6, 6), min_size=2, max_size=7)


def decisions(z, taken):
    """The decisions of a position at which candidate `taken` was taken; the last one is not asked."""
    asked = min(taken + 1, len(z) - 1)
    return torch.tensor(z[:asked], dtype=torch.double), torch.arange(asked) == taken


@given(logits)
def test_decisions_multiply_to_the_gates_distribution(z):
    each = [float(decision_log_probs(*decisions(z, k)).sum()) for k in range(len(z))]
    gate = gated_log_probs(torch.tensor([z], dtype=torch.double), torch.ones(1, len(z), dtype=torch.bool))[0]
    assert each == pytest.approx(gate.tolist(), abs=1e-9)
    assert sum(map(math.exp, each)) == pytest.approx(1.0)


@given(logits, st.data())
def test_the_kl_of_visited_decisions_is_that_of_tokens_on_average(z, data):
    h = data.draw(st.lists(st.floats(-6, 6), min_size=len(z), max_size=len(z)))
    z, h = torch.tensor(z, dtype=torch.double), torch.tensor(h, dtype=torch.double)
    each = decision_kl(z, h)[:-1]  # the last candidate is not asked
    assert bool((each >= -1e-12).all()) and float(decision_kl(h, h).abs().max()) == 0
    live = torch.ones(1, len(z), dtype=torch.bool)
    taken = gated_log_probs(z[None], live).exp()[0]
    average = sum(float(p * each[: k + 1].sum()) for k, p in enumerate(taken))
    assert average == pytest.approx(float(kl_to_base(z[None], h[None], live)), abs=1e-8)


def batch(generator, n=12, replies=4):
    scores, hazards = torch.randn(2, n, generator=generator, dtype=torch.double)
    accepted = torch.rand(n, generator=generator) < 0.5
    return scores, hazards, accepted, torch.randint(replies, (n,), generator=generator), replies


@given(st.integers(0, 50))
def test_a_head_that_scores_zero_is_the_base_model(seed):
    scores, *rest = batch(torch.Generator().manual_seed(seed))
    assert float(reply_log_ratios(torch.zeros_like(scores), *rest).abs().max()) == 0


def test_log_ratios_add_up_reply_by_reply():
    generator = torch.Generator().manual_seed(1)
    scores, hazards, accepted, reply, n = batch(generator)
    got = reply_log_ratios(scores, hazards, accepted, reply, n)
    for r in range(n):
        want = 0.0
        for f, h, a, owner in zip(scores, hazards, accepted, reply, strict=True):
            if owner == r:
                gated, base = torch.sigmoid(h + f), torch.sigmoid(h)
                want += float(torch.log(gated / base) if a else torch.log((1 - gated) / (1 - base)))
        assert float(got[r]) == pytest.approx(want)


@pytest.mark.parametrize(
    "loss",
    [
        lambda ratios: dpo_loss(ratios[:2], ratios[2:], 0.3),
        lambda ratios: kto_loss(ratios, torch.tensor([True, False, True, False]), 0.3, 1.5),
    ],
    ids=["dpo", "kto"],
)
def test_gradients_agree_with_finite_differences(loss):
    scores, *rest = batch(torch.Generator().manual_seed(4))
    mean = float(reply_log_ratios(scores, *rest).mean())
    assert mean < 0, "else the reference point of KTO moves, which counts for no gradient"
    scores.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: loss(reply_log_ratios(x, *rest)), [scores])


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.01, 2))
def test_dpo_is_the_log_odds_of_the_preference(chosen, rejected, beta):
    loss = float(dpo_loss(torch.tensor([chosen]), torch.tensor([rejected]), beta))
    assert loss == pytest.approx(math.log(1 + math.exp(-beta * (chosen - rejected))), rel=1e-4)


def test_losses_start_where_nothing_is_learnt():
    zero, good = torch.zeros(4), torch.tensor([True, True, True, False])
    assert float(dpo_loss(zero, zero, 0.3)) == pytest.approx(math.log(2))
    assert float(kto_loss(zero, good, 0.3, 1 / 3)) == pytest.approx(0.5)


def test_kto_pulls_good_and_bad_replies_apart_whichever_is_rarer():
    good = torch.tensor([True, True, True, False])
    ratios = torch.zeros(4, requires_grad=True)
    kto_loss(ratios, good, 0.3, good_weight=1 / 3).backward()
    assert ratios.grad[0] < 0 < ratios.grad[3]
    assert float(-ratios.grad[:3].sum()) == pytest.approx(float(ratios.grad[3])), "three good ones weigh as one bad one"
    better = kto_loss(torch.tensor([1.0, 1.0, 1.0, -1.0]), good, 0.3, 1 / 3)
    assert float(better) < 0.5 < float(kto_loss(torch.tensor([-1.0, -1.0, -1.0, 1.0]), good, 0.3, 1 / 3))
