"""The scale of a head, and its strength in greedy requests, are such that replies keep perplexity and variety."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.q import QHead
from mara_integrations.training.scoring import q_scale
from mara_integrations.training.scoring.q_scale import (
    MAX_PERPLEXITY_RATIO,
    MIN_DISTINCT_RATIO,
    quality_losses,
    strength_within_losses,
)


@pytest.mark.parametrize(
    ("perplexity", "distinct", "is_within"),
    [
        (1.0, 1.0, True),
        (0.8, 1.2, True),
        (MAX_PERPLEXITY_RATIO, MIN_DISTINCT_RATIO + 1e-9, True),
        (MAX_PERPLEXITY_RATIO + 0.01, 1.0, False),
        (1.0, MIN_DISTINCT_RATIO - 0.01, False),
    ],
)
def test_a_loss_is_1_at_its_bound(perplexity, distinct, is_within):
    assert (max(quality_losses(perplexity, distinct)) <= 1.0) is is_within


@given(share=st.floats(0.5, 0.99), power=st.floats(1.5, 4.0))
def test_losses_that_are_powers_of_the_strength_are_met_in_few_trials(share, power):
    tried = []

    def losses_at(strength):
        tried.append(strength)
        return (strength / share) ** power, 0.5 * (strength / share) ** power

    strength, _ = strength_within_losses(losses_at)

    assert len(tried) <= 3
    assert losses_at(strength)[0] == pytest.approx(1.0, abs=0.1), "the larger of both"


@given(seed=st.integers(0, 1000))
def test_what_few_replies_tell_by_chance_is_averaged_over_the_trials(seed):
    noise = random.Random(seed)

    def losses_at(strength):
        return [(strength / 0.6) ** 2.8 * noise.uniform(0.8, 1.25) for _ in range(2)]

    assert 0.5 <= strength_within_losses(losses_at)[0] <= 0.72


def test_a_strength_is_at_most_1():
    losses = iter([(1.2, 0.0), (0.01, 0.0), (0.01, 0.0)])
    strength, is_kept = strength_within_losses(lambda _: next(losses))
    assert strength <= 1.0 and is_kept


def test_a_head_that_costs_nothing_keeps_its_full_strength():
    assert strength_within_losses(lambda _: (-0.3, 0.9)) == (1.0, True)


def test_a_loss_that_no_trial_bounds_is_said():
    strength, is_kept = strength_within_losses(lambda _: (0.0, 2.0))
    assert not is_kept and 0 < strength < 1.0


@pytest.mark.parametrize(
    ("perplexity", "distinct", "budget", "scale", "held"),
    [
        (1.10, 0.97, None, 2.0, 2.0),  # within both bounds
        (1.10, 0.90, None, 2.0, 2.0 * 2.0 ** (-1 / 2.8)),  # twice what variety may lose, at the scale of the replies
        (1.15**4, 0.97, None, 2.0, 2.0 * 4.0 ** (-1 / 2.8)),  # four times what perplexity may
        (1.10, 0.90, None, 1.2, 1.2),  # the scale of the budget is lower already
        (1.10, 0.90, 0.3, 2.0, 2.0),  # a budget that the user has named
    ],
)
def test_sampled_replies_keep_perplexity_and_variety(perplexity, distinct, budget, scale, held, monkeypatch):
    head = QHead(HeadConfig(form="q", hidden_size=16, scale=scale))
    run = SimpleNamespace(config=SimpleNamespace(kl_budget=budget), say=lambda _: None)
    monkeypatch.setattr(q_scale, "quality_ratios", lambda *_: (perplexity, distinct))

    q_scale.hold_sampled_quality(run, head, 2.0, [], [])

    assert head.config.scale == pytest.approx(held)


def test_ratios_of_quality_are_those_of_all_replies():
    def reply(token_ids, log_prob):
        return SimpleNamespace(token_ids=token_ids, log_probs=[log_prob] * len(token_ids))

    base = [reply([1, 2, 3], -1.0), reply([4, 5, 6], -1.0)]  # 4 pairs, all distinct
    gated = [reply([1, 2, 1], -1.5), reply([1, 2, 3], -1.5)]  # 4 pairs, 3 of them distinct

    perplexity, distinct = q_scale.quality_ratios(base, gated)

    assert perplexity == pytest.approx(math.exp(0.5))
    assert distinct == pytest.approx(0.75)
