"""The cost of a forward of T tokens, and how many to feed at once. Affects speed, never tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from mara_integrations.engine.backends.protocol import Backend, Segment

# Widths to choose from; kernels have steps after 4, 6 or 8 rows.
WIDTHS = (1, 2, 4, 6, 8, 12, 16, 32)
# Candidates that a choice looks ahead at; what comes after so many rejections hardly counts.
HORIZON = 64
_PREFIX_TOKENS = 16
# A model too large to be measured in this time is judged by the widths that were; the first pass makes the kernels.
_MEASURE_S, _PASSES = 1.2, 3


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Cost of a forward by its tokens, straight between the points, relative to one token.

    Attributes:
        points: Pairs of tokens and cost, both rising; beyond the last the slope of the last two goes on.
    """

    points: tuple[tuple[int, float], ...]

    @classmethod
    def flat_to(cls, knee: int) -> CostCurve:
        """Nearly free up to `knee` tokens, then half as much again for each as many more: measured on CPU cores."""
        return cls(((1, 1.0), (knee + 1, 1.15), (2 * knee + 1, 1.72)))

    def __call__(self, num_tokens: int) -> float:
        """Cost of a forward, at least 1 token."""
        (x0, y0), (x1, y1) = next(
            (pair for pair in pairwise(self.points) if num_tokens <= pair[1][0]), self.points[-2:]
        )
        return y0 + (y1 - y0) * (num_tokens - x0) / (x1 - x0)


@lru_cache(maxsize=4096)
def best_width(cost: CostCurve, num_rows: int, num_left: int, first: float, later: float) -> int:
    """Choose how many candidates to feed next, for the least expected cost until one is accepted or all are fed.

    Args:
        cost: The cost of a forward; a row is charged an equal share of one in which all rows do the same.
        num_rows: Rows in a forward.
        num_left: Candidates that are not fed yet, at least 1; more than `HORIZON` count as that many.
        first: Probability that the first of them is accepted.
        later: Probability that each other one is accepted.
    """
    return _least(cost, num_rows, num_left, first, later)[1]


@lru_cache(maxsize=4096)
def best_draft(cost: CostCurve, num_rows: int, num_left: int, first: float, later: float, right: float) -> int:
    """Choose how many drafted tokens to feed behind the next candidate, for the least expected cost a token taken.

    Args:
        cost: As in `best_width`.
        num_rows: As in `best_width`.
        num_left: As in `best_width`; 1 where the next token is already taken.
        first: As in `best_width`; 1 where the next token is already taken.
        later: As in `best_width`.
        right: Probability that a drafted token is the one taken, if those before it are.

    Returns:
        0 where it is better to feed siblings of the candidate.
    """
    after_rejection = (1 - first) * _least(cost, num_rows, num_left - 1, later, later)[0] if num_left > 1 else 0.0
    options = [(_least(cost, num_rows, num_left, first, later)[0], 0)]
    for width in WIDTHS[1:]:
        num_taken = 1 + first * sum(right**place for place in range(1, width))
        options.append(((cost(num_rows * width) / num_rows + after_rejection) / num_taken, width - 1))
    return min(options)[1]


def _least(cost: CostCurve, num_rows: int, num_left: int, first: float, later: float) -> tuple[float, int]:
    """Return the least expected cost with so many candidates left, and the width that has it."""
    return min(_options(cost, num_rows, min(num_left, HORIZON), first, later, _least_later(cost, num_rows, later)))


@lru_cache(maxsize=1024)
def _least_later(cost: CostCurve, num_rows: int, later: float) -> list[tuple[float, int]]:
    """Return the least expected cost and its width for 0 to `HORIZON` - 1 candidates, all accepted alike."""
    best: list[tuple[float, int]] = [(0.0, 0)]
    for num_left in range(1, HORIZON):
        best.append(min(_options(cost, num_rows, num_left, later, later, best)))
    return best


def _options(
    cost: CostCurve, num_rows: int, num_left: int, first: float, later: float, best: list[tuple[float, int]]
) -> Iterator[tuple[float, int]]:
    """Yield the expected cost of each width and the width, given the `best` ones for fewer candidates."""
    for width in {min(width, num_left) for width in WIDTHS} | {num_left}:
        all_rejected = (1 - first) * (1 - later) ** (width - 1)
        yield cost(num_rows * width) / num_rows + all_rejected * best[num_left - width][0], width


@torch.inference_mode()
def measure(backend: Backend, default: CostCurve) -> CostCurve:
    """Time siblings of one row, all widths in turn, for about a second but at least two; the best of each counts.

    Widths that were not reached cost as `default` says, in proportion.
    """
    clock = time.thread_time if backend.device.type == "cpu" else time.perf_counter  # what else runs takes no part
    best_s: dict[int, float] = {}
    row, end_s = backend.open(), time.perf_counter() + _MEASURE_S
    try:
        backend.feed([Segment(row, [0] * _PREFIX_TOKENS)])
        for width in [width for width in WIDTHS if width <= backend.max_siblings] * _PASSES:
            if time.perf_counter() > end_s and len(best_s) > 1:
                break
            start_s = clock()
            float(backend.feed([Segment(row, [0] * width, siblings=True)])[0, 0])  # waits for the device
            backend.commit([row], [0])
            best_s[width] = min(clock() - start_s, best_s.get(width, math.inf))
    finally:
        backend.close(row)
    points = [(n, min(s for other, s in best_s.items() if other >= n)) for n in sorted(best_s)]  # what disturbs, adds
    known, one_s = points[-1][0], points[0][1]
    scale = points[-1][1] / one_s / default(known)
    beyond = ((n, default(n) * scale) for n in (2 * known, 8 * known, 64 * known))
    return CostCurve((*((n, s / one_s) for n, s in points), *beyond))
