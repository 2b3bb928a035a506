"""What a forward of T tokens costs, and how many candidates are best fed at once. It changes time, never tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from mara_integrations.engine.backend import Backend, Segment

# A forward that costs this much of one token's carries what is drafted at little cost: a kept token saves a whole one.
_KNEE = 1.5
_WIDTHS = (1, 2, 4, 8, 16, 32)
_PREFIX_TOKENS = 16
# A model too large to be measured in this time is judged by the widths that were.
_MEASURE_S = 1.0


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

    @property
    def knee(self) -> int:
        """Tokens a forward carries at little cost."""
        last = self.points[-1][0]
        return max((n for n in range(1, min(last, 4096) + 1) if self(n) <= _KNEE), default=1)


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
def _least(cost: CostCurve, num_rows: int, num_left: int, first: float, later: float) -> tuple[float, int]:
    options = []
    for width in sorted({min(1 << bits, num_left) for bits in range(num_left.bit_length() + 1)}):
        expected = cost(num_rows * width) / num_rows
        if width < num_left:
            rejected = (1 - first) * (1 - later) ** (width - 1)
            expected += rejected * _least(cost, num_rows, num_left - width, later, later)[0]
        options.append((expected, width))
    return min(options)


@torch.inference_mode()
def measure(backend: Backend, default: CostCurve) -> CostCurve:
    """Time siblings of one row, the wider the later, for at most about a second or two widths.

    Widths that were not reached cost as `default` says, in proportion.
    """
    row, end_s = backend.open(), time.perf_counter() + _MEASURE_S
    points: list[tuple[int, float]] = []
    try:
        backend.feed([Segment(row, [0] * _PREFIX_TOKENS)])
        for width in _WIDTHS:
            taken_s = []
            for _ in range(2):
                start_s = time.perf_counter()
                float(backend.feed([Segment(row, [0] * width, siblings=True)])[0, 0])  # waits for the device
                taken_s.append(time.perf_counter() - start_s)
                if time.perf_counter() > end_s and len(points) > 1:
                    break
            points.append((width, max([min(taken_s), *(cost for _, cost in points)])))  # a wider one is never cheaper
            if time.perf_counter() > end_s and len(points) > 1:
                break
    finally:
        backend.close(row)
    one_s = points[0][1]
    known, scale = points[-1][0], points[-1][1] / one_s / default(points[-1][0])
    beyond = ((n, default(n) * scale) for n in (2 * known, 8 * known, 64 * known))
    return CostCurve((*((n, s / one_s) for n, s in points), *beyond))
