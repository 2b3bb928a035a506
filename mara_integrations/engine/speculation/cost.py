"""What a forward of T tokens costs, and how many of them are best fed at once. It changes time, never tokens."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from mara_integrations.engine.backends.protocol import Backend, Segment

# Widths to choose from; kernels have steps after 4, 6 or 8 rows.
WIDTHS = (1, 2, 4, 6, 8, 12, 16, 32)
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
    """How many candidates to feed next, for the least expected cost until one is accepted or all are fed.

    Args:
        cost: Of a forward; a row is charged an equal share of one in which all rows do the same.
        num_rows: Rows in a forward.
        num_left: Candidates not fed yet, at least 1.
        first: Probability that the first of them is accepted.
        later: Of each other one.
    """
    return _least(cost, num_rows, num_left, first, later)[1]


@lru_cache(maxsize=4096)
def best_draft(cost: CostCurve, num_rows: int, num_left: int, first: float, later: float, right: float) -> int:
    """How many drafted tokens to feed behind the next candidate, for the least expected cost a token taken.

    Args:
        cost: As in `best_width`.
        num_rows: As in `best_width`.
        num_left: As in `best_width`; a token that is certain is the only one left.
        first: As in `best_width`; 1 for a token that is certain.
        later: As in `best_width`.
        right: Probability that a drafted token is what is taken, if those before it are.

    Returns:
        0 where siblings of the candidate are the better company.
    """
    after_rejection = (1 - first) * _least(cost, num_rows, num_left - 1, later, later)[0] if num_left > 1 else 0.0
    options = [(_least(cost, num_rows, num_left, first, later)[0], 0)]
    for width in WIDTHS[1:]:
        num_taken = 1 + first * sum(right**place for place in range(1, width))
        options.append(((cost(num_rows * width) / num_rows + after_rejection) / num_taken, width - 1))
    return min(options)[1]


@lru_cache(maxsize=4096)
def _least(cost: CostCurve, num_rows: int, num_left: int, first: float, later: float) -> tuple[float, int]:
    options = []
    for width in {min(width, num_left) for width in WIDTHS} | {num_left}:
        expected = cost(num_rows * width) / num_rows
        if width < num_left:
            rejected = (1 - first) * (1 - later) ** (width - 1)
            expected += rejected * _least(cost, num_rows, num_left - width, later, later)[0]
        options.append((expected, width))
    return min(options)


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
        for width in WIDTHS * _PASSES:
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
