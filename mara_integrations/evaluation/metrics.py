"""Measures of replies and intervals around them: pure functions over numbers and tokens.

Every comparison is paired by prompt: base and gated replies to one prompt stay together when prompts are resampled.
Knows nothing of models or rewards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mara_integrations.errors import ShapeError

_Numbers: TypeAlias = NDArray[np.float64]

_Z = 1.959963984540054  # normal quantile of a 95 % interval
_TAILS = (2.5, 97.5)  # percentiles of the same
_CELLS = 2_000_000  # of the index matrix drawn at once; 16 MB


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval."""

    mean: float
    low: float
    high: float


def wilson(successes: int, n: int) -> Interval:
    """Return the share of successes, with an interval that stays honest near 0 and 1 and for few trials.

    Raises:
        ShapeError: Unless 0 <= successes <= n and n >= 1.

    Source: Wilson 1927, the score interval.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ShapeError(f"{successes!r} successes of {n!r} are not a share", hint="n is at least 1")
    share, z2 = successes / n, _Z * _Z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Interval(share, max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share)))


def opinions(
    base: Sequence[float | None], gated: Sequence[float | None]
) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Return the pairs in which a reward scores both replies: base scores, gated scores, number of pairs dropped.

    Raises:
        ShapeError: If the lengths differ.
    """
    _check_paired(base, gated, least=0)
    pairs = [(b, g) for b, g in zip(base, gated, strict=True) if b is not None and g is not None]
    return tuple(b for b, _ in pairs), tuple(g for _, g in pairs), len(base) - len(pairs)


def paired_bootstrap(base: Sequence[float], gated: Sequence[float], seed: int = 0, resamples: int = 10_000) -> Interval:
    """Mean of gated - base, with the percentile interval over resampled prompts.

    The interval is a point where all differences are the same, however few they are: read it beside their number.

    Args:
        base: One number a prompt.
        gated: One number a prompt, in the same order.
        seed: Seed of the resampling.
        resamples: Number of resampled data sets.

    Raises:
        ShapeError: If the lengths differ or there is no pair.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    _check_paired(base, gated)
    differences = np.asarray(gated, np.float64) - np.asarray(base, np.float64)  # (N,)
    return _bootstrap(lambda drawn: differences[drawn].mean(-1), len(differences), seed, resamples)


def win_counts(base: Sequence[float], gated: Sequence[float]) -> tuple[int, int, int]:
    """Prompts on which the gated reply scores higher, the same, lower.

    Raises:
        ShapeError: If the lengths differ.
    """
    _check_paired(base, gated, least=0)
    signs = _signs(base, gated)
    return int((signs > 0).sum()), int((signs == 0).sum()), int((signs < 0).sum())


def preference_rate(base: Sequence[float], gated: Sequence[float]) -> float:
    """(wins - losses) / N, ties counted in N.

    Raises:
        ShapeError: If the lengths differ or there is no pair.

    Source: Zhang et al. 2025 (arXiv 2505.19743), section 4.
    """
    _check_paired(base, gated)
    return float(_signs(base, gated).mean())


def preference_interval(
    base: Sequence[float], gated: Sequence[float], seed: int = 0, resamples: int = 10_000
) -> Interval:
    """`preference_rate` with its interval; arguments, errors and caveat as in `paired_bootstrap`."""
    _check_paired(base, gated)
    signs = _signs(base, gated)
    return paired_bootstrap([0.0] * len(signs), signs.tolist(), seed, resamples)


def perplexity(log_probs: Sequence[float]) -> float:
    """Return the perplexity of all tokens of all replies, pooled: a long reply weighs more.

    Args:
        log_probs: Log-probability of every token, in nats.

    Raises:
        ShapeError: If there is no token.
    """
    if len(log_probs) == 0:
        raise ShapeError("perplexity of no token", hint="give at least one log-probability")
    return math.exp(-math.fsum(log_probs) / len(log_probs))


def perplexity_ratio(
    base: Sequence[Sequence[float]], gated: Sequence[Sequence[float]], seed: int = 0, resamples: int = 10_000
) -> Interval:
    """Perplexity of the gated replies over that of the base replies, each pooled, with the paired bootstrap interval.

    Args:
        base: Log-probabilities of the tokens of each reply, in nats.
        gated: The same for the gated replies, in the same order.
        seed: Seed of the resampling.
        resamples: Number of resampled data sets.

    Raises:
        ShapeError: If the lengths differ, there is no pair, or a reply has no token.
    """
    _check_paired(base, gated)
    if not all(len(reply) for reply in (*base, *gated)):
        raise ShapeError("perplexity of a reply without tokens", hint="leave such pairs out")
    base_sums, base_counts = _sums(base), _counts(base)
    gated_sums, gated_counts = _sums(gated), _counts(gated)

    def ratio(drawn: NDArray[np.intp]) -> _Numbers:
        base_mean = base_sums[drawn].sum(-1) / base_counts[drawn].sum(-1)
        gated_mean = gated_sums[drawn].sum(-1) / gated_counts[drawn].sum(-1)
        return np.asarray(np.exp(base_mean - gated_mean))

    return _bootstrap(ratio, len(base), seed, resamples)


def distinct_n(replies: Sequence[Sequence[Hashable]], n: int = 2) -> float:
    """Distinct n-grams over all n-grams, pooled over the replies; 0 where no reply is n long.

    More tokens repeat more: compare only sets of about the same size.

    Args:
        replies: The tokens, or words, of each reply.
        n: Length of the n-grams.

    Source: Li et al. 2016 (arXiv 1510.03055), section 5.
    """
    grams = [tuple(reply[i : i + n]) for reply in replies for i in range(len(reply) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _bootstrap(statistic: Callable[[NDArray[np.intp]], _Numbers], n: int, seed: int, resamples: int) -> Interval:
    """Percentile interval of a statistic that maps (R, N) indices of pairs to R numbers."""
    random = np.random.default_rng(seed)
    rows = max(1, _CELLS // n)
    drawn = (random.integers(n, size=(min(rows, resamples - done), n)) for done in range(0, resamples, rows))
    low, high = np.percentile(np.concatenate([statistic(indices) for indices in drawn]), _TAILS)
    mean = float(statistic(np.arange(n)[None])[0])
    return Interval(mean, min(float(low), mean), max(float(high), mean))  # equal but for rounding where all pairs agree


def _signs(base: Sequence[float], gated: Sequence[float]) -> _Numbers:
    return np.asarray(np.sign(np.asarray(gated, np.float64) - np.asarray(base, np.float64)))


def _sums(replies: Sequence[Sequence[float]]) -> _Numbers:
    return np.asarray([math.fsum(reply) for reply in replies])


def _counts(replies: Sequence[Sequence[float]]) -> _Numbers:
    return np.asarray([len(reply) for reply in replies], np.float64)


def _check_paired(base: Sequence[object], gated: Sequence[object], least: int = 1) -> None:
    if len(base) != len(gated) or len(base) < least:
        raise ShapeError(
            f"{len(base)} base and {len(gated)} gated values are not pairs",
            hint=f"give {least} or more of each, paired",
        )
