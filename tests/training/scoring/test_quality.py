"""Gated replies are compared with base replies in perplexity and variety."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from mara_integrations.training.scoring.quality import (
    MAX_PERPLEXITY_RATIO,
    MIN_DISTINCT_RATIO,
    quality_losses,
    quality_ratios,
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


def test_a_bound_on_variety_can_be_another():
    assert quality_losses(1.0, 0.85, least_distinct=0.9) == pytest.approx((0.0, 1.5))


def test_ratios_of_quality_are_those_of_all_replies():
    def reply(token_ids, log_prob):
        return SimpleNamespace(token_ids=token_ids, log_probs=[log_prob] * len(token_ids))

    base = [reply([1, 2, 3], -1.0), reply([4, 5, 6], -1.0)]  # 4 pairs, all distinct
    gated = [reply([1, 2, 1], -1.5), reply([1, 2, 3], -1.5)]  # 4 pairs, 3 of them distinct

    perplexity, distinct = quality_ratios(base, gated)

    assert perplexity == pytest.approx(math.exp(0.5))
    assert distinct == pytest.approx(0.75)
