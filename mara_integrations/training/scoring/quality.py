"""Compares the perplexity and variety of gated replies with those of base replies."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mara_integrations.evaluation.metrics import distinct_n, perplexity_ratio
from mara_integrations.training.rollouts.replies import Reply

# Replies may have this perplexity, and this share of distinct pairs of tokens, relative to the base model's.
MAX_PERPLEXITY_RATIO, MIN_DISTINCT_RATIO = 1.15, 0.95


def quality_ratios(base: Sequence[Reply], gated: Sequence[Reply]) -> tuple[float, float]:
    """Return perplexity under the base model, and share of distinct pairs of tokens, of gated replies over base ones.

    Args:
        base: Replies of the base model, one or more a prompt.
        gated: Replies of the head to the same prompts.
    """
    perplexity = perplexity_ratio([reply.log_probs for reply in base], [reply.log_probs for reply in gated])
    of_base, of_gated = (distinct_n([reply.token_ids for reply in side]) for side in (base, gated))
    return perplexity.mean, of_gated / of_base if of_base else 1.0


def quality_losses(
    perplexity_ratio: float, distinct_ratio: float, least_distinct: float = MIN_DISTINCT_RATIO
) -> tuple[float, float]:
    """Return what replies lose of each measure, as a share of what they may lose: up to 1 is within the bound.

    Args:
        perplexity_ratio: Perplexity of the gated replies over that of the base replies.
        distinct_ratio: The same of distinct pairs of tokens.
        least_distinct: Least share of distinct pairs that they may have.
    """
    return (
        math.log(perplexity_ratio) / math.log(MAX_PERPLEXITY_RATIO),
        (1.0 - distinct_ratio) / (1.0 - least_distinct),
    )
