"""Laws of the metrics, and values worked out by hand or known from elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.errors import ShapeError
from mara_integrations.evaluation.metrics import (
    Interval,
    distinct_n,
    opinions,
    paired_bootstrap,
    perplexity,
    perplexity_ratio,
    preference_interval,
    preference_rate,
    wilson,
    win_counts,
)

scores = st.floats(-100, 100, allow_subnormal=False)
pairs = st.lists(st.tuples(scores, scores), min_size=1, max_size=20).map(lambda rows: tuple(zip(*rows, strict=True)))
FEW = 200  # resamples, where only laws are checked


@given(pairs)
def test_the_preference_rate_changes_sign_when_the_sides_are_swapped(pair):
    base, gated = pair
    assert preference_rate(base, gated) == -preference_rate(gated, base)


@given(pairs)
def test_the_preference_rate_is_wins_minus_losses_over_all_pairs(pair):
    wins, ties, losses = win_counts(*pair)
    assert wins + ties + losses == len(pair[0])
    assert preference_rate(*pair) == pytest.approx((wins - losses) / len(pair[0]))


@given(pairs, st.integers(0, 5))
def test_an_interval_contains_its_mean_and_is_the_same_for_the_same_seed(pair, seed):
    for measure in (paired_bootstrap, preference_interval):
        interval = measure(*pair, seed=seed, resamples=FEW)
        assert interval.low <= interval.mean <= interval.high
        assert interval == measure(*pair, seed=seed, resamples=FEW)


@given(pairs)
def test_the_difference_is_that_of_the_means(pair):
    base, gated = pair
    difference = paired_bootstrap(base, gated, resamples=FEW).mean
    assert difference == pytest.approx(np.mean(gated) - np.mean(base), abs=1e-9)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_stays_a_share_and_mirrors(case):
    successes, n = case
    interval, mirrored = wilson(successes, n), wilson(n - successes, n)
    assert 0 <= interval.low <= interval.mean == successes / n <= interval.high <= 1
    assert interval.low < interval.high, "even where all trials agree"
    assert interval.low == pytest.approx(1 - mirrored.high)


def test_wilson_is_narrower_with_more_trials():
    widths = [wilson(n // 2, n).high - wilson(n // 2, n).low for n in (10, 100, 1000)]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize(
    ("case", "low", "high"), [((0, 10), 0.0, 0.2775), ((15, 148), 0.0624, 0.1605), ((81, 263), 0.2553, 0.3662)]
)
def test_wilson_gives_the_published_values(case, low, high):
    # Newcombe 1998, table I, method 3 (the first from the closed form z2 / (n + z2)).
    interval = wilson(*case)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


def test_the_bootstrap_interval_agrees_with_the_normal_one_on_many_pairs():
    random = np.random.default_rng(1)
    base = random.normal(size=400)
    gated = base + 0.3 + random.normal(scale=0.5, size=400)  # the shared part cancels: that is what pairing is for
    interval = paired_bootstrap(base.tolist(), gated.tolist(), seed=2)
    half = 1.96 * (gated - base).std(ddof=1) / math.sqrt(400)
    assert interval.low == pytest.approx(interval.mean - half, abs=0.01)
    assert interval.high == pytest.approx(interval.mean + half, abs=0.01)


def test_resampling_many_prompts_in_pieces_gives_one_interval():
    base, gated = [0.0] * 700, [1.0, -1.0] * 350
    interval = preference_interval(base, gated)
    assert interval.mean == 0.0
    assert interval.high == pytest.approx(1.96 / math.sqrt(700), abs=0.01)


def test_pairs_without_an_opinion_are_dropped_and_counted():
    assert opinions([1.0, None, 0.0, None], [0.5, 2.0, None, None]) == ((1.0,), (0.5,), 3)
    assert opinions([], []) == ((), (), 0)


def test_perplexity_pools_over_tokens():
    assert perplexity([math.log(0.25)] * 7) == pytest.approx(4.0)
    assert perplexity([0.0, math.log(0.25)]) == pytest.approx(2.0)


@given(st.lists(st.lists(st.floats(-9, 0), min_size=1, max_size=5), min_size=1, max_size=8))
def test_the_perplexity_ratio_is_that_of_the_pooled_perplexities(replies):
    doubled = [[2 * value for value in reply] for reply in replies]
    flat = [value for reply in replies for value in reply]
    ratio = perplexity_ratio(replies, doubled, resamples=FEW)
    assert ratio.mean == pytest.approx(perplexity([2 * value for value in flat]) / perplexity(flat))
    assert ratio.low <= ratio.mean <= ratio.high
    same = perplexity_ratio(replies, replies, resamples=FEW)
    assert (same.low, same.mean, same.high) == (1.0, 1.0, 1.0)


def test_distinct_n_counts_within_replies_only():
    assert distinct_n([[1, 2, 1, 2]], 2) == pytest.approx(2 / 3)
    assert distinct_n([[1, 2], [1, 2], [3, 4]], 2) == pytest.approx(2 / 3)
    assert distinct_n([[1], []], 2) == 0.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson(3, 2),
        lambda: wilson(0, 0),
        lambda: paired_bootstrap([1.0], [1.0, 2.0]),
        lambda: paired_bootstrap([], []),
        lambda: preference_rate([], []),
        lambda: perplexity([]),
        lambda: perplexity_ratio([[0.1], []], [[0.1], [0.2]]),
        lambda: opinions([1.0], []),
    ],
)
def test_what_is_no_comparison_is_refused(call):
    with pytest.raises(ShapeError):
        call()


def test_an_interval_is_a_value():
    assert Interval(0.5, 0.25, 0.75) == Interval(0.5, 0.25, 0.75)
