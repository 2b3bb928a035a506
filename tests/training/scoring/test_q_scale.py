"""The scale of a Q-head is lowered until greedy replies keep perplexity and variety, and no further than that needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.training.scoring.q_scale import (
    MAX_PERPLEXITY_RATIO,
    MIN_DISTINCT_RATIO,
    quality_loss,
    scale_within_loss,
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
def test_the_loss_is_1_at_the_nearer_bound(perplexity, distinct, is_within):
    assert (quality_loss(perplexity, distinct) <= 1.0) is is_within


@given(start=st.floats(0.1, 10.0), share=st.floats(0.6, 0.99), power=st.floats(1.5, 5.0))
def test_a_loss_that_is_a_power_of_the_scale_is_bounded_in_few_trials_and_tightly(start, share, power):
    tried = []

    def loss_at(scale):
        tried.append(scale)
        return (scale / (share * start)) ** power

    scale, is_kept = scale_within_loss(start, loss_at)

    assert is_kept and scale == tried[-1] and loss_at(scale) <= 1.0
    assert tried[:-1] == sorted(tried[:-1], reverse=True), "it is only ever lowered"
    assert scale >= 0.6 * share * start, "not much further than it had to be"


def test_a_scale_that_costs_nothing_stays():
    assert scale_within_loss(1.7, lambda _: -0.3) == (1.7, True)


def test_a_loss_that_no_trial_bounds_is_said():
    scale, is_kept = scale_within_loss(1.0, lambda _: 2.0)
    assert not is_kept and 0 < scale < 1.0
