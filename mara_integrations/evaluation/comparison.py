"""The figures of an evaluation, from scores and replies: pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import chain

from mara_integrations.engine.generation import Generation
from mara_integrations.evaluation.metrics import (
    distinct_n,
    opinions,
    paired_bootstrap,
    perplexity,
    preference_interval,
    wilson,
    win_counts,
)
from mara_integrations.evaluation.results import Comparison, Side


def compare(
    base_scores: Sequence[float | None], gated_scores: Sequence[float | None], changed: Sequence[bool], seed: int
) -> Comparison:
    """Compare what one reward says of the two sides.

    Args:
        base_scores: One a prompt; None where the reward has no opinion.
        gated_scores: The same for the gated replies.
        changed: Whether the two replies to each prompt differ.
        seed: Seed of the intervals.
    """
    base, gated, num_dropped = opinions(base_scores, gated_scores)
    n = len(base)
    if n == 0:
        return Comparison(0, num_dropped)
    wins, ties, losses = win_counts(base, gated)
    is_binary = set(base) | set(gated) <= {0.0, 1.0}
    least = 1.0 if is_binary else statistics.median(base)
    pairs = [
        (gated_score < base_score, is_changed)
        for base_score, gated_score, is_changed in zip(base_scores, gated_scores, changed, strict=True)
        if base_score is not None and gated_score is not None and base_score >= least
    ]
    return Comparison(
        num_pairs=n,
        num_dropped=num_dropped,
        base_mean=math.fsum(base) / n,
        gated_mean=math.fsum(gated) / n,
        difference=paired_bootstrap(base, gated, seed),
        preference=preference_interval(base, gated, seed),
        wins=wins,
        ties=ties,
        losses=losses,
        base_compliance=wilson(base.count(1.0), n) if is_binary else None,
        gated_compliance=wilson(gated.count(1.0), n) if is_binary else None,
        num_fine=len(pairs),
        fine_changed=wilson(sum(is_changed for _, is_changed in pairs), len(pairs)) if pairs else None,
        fine_worse=sum(is_worse for is_worse, _ in pairs),
    )


def side_of(generations: Sequence[Generation], seconds: float) -> Side:
    """Return the measures of one side's replies, which took this long."""
    num_tokens = sum(len(g.token_ids) for g in generations)
    return Side(
        num_tokens=num_tokens,
        mean_length=num_tokens / len(generations),
        ended=sum(g.finish_reason == "stop" for g in generations) / len(generations),
        perplexity=perplexity(list(chain.from_iterable(g.log_probs for g in generations))),
        distinct_2=distinct_n([g.token_ids for g in generations], 2),
        forwards_per_token=sum(g.stats.fed for g in generations) / num_tokens,
        tokens_per_s=num_tokens / seconds,
    )
