"""Two heads on the same prompts and the same random numbers: paired differences, from an evaluation of each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mara_integrations.errors import ConfigError
from mara_integrations.evaluation.metrics import Interval, opinions, paired_bootstrap, perplexity_ratio, win_counts
from mara_integrations.evaluation.results import Evaluation


@dataclass(frozen=True, slots=True)
class ScoreDifference:
    """Scores of one reward on the replies of two heads; the measures are None where it has no opinion on any pair.

    Attributes:
        num_pairs: Prompts on which it has an opinion on both replies; all else counts only these.
        num_dropped: The other prompts.
        first_mean: Mean score of the first head's replies.
        other_mean: Mean score of the other head's replies.
        difference: other_mean - first_mean.
        wins: Prompts on which the other head's reply scores higher.
        ties: Prompts on which both score the same.
        losses: Prompts on which the first head's reply scores higher.
    """

    num_pairs: int
    num_dropped: int
    first_mean: float | None = None
    other_mean: float | None = None
    difference: Interval | None = None
    wins: int = 0
    ties: int = 0
    losses: int = 0


@dataclass(frozen=True, slots=True)
class HeadComparison:
    """A head beside another one.

    Attributes:
        first: Name of the head that the other one is compared with.
        other: Name of the other head.
        num_prompts: Number of prompts.
        num_changed: Prompts to which the two reply differently.
        rewards: Difference by reward.
        perplexity_ratio: Perplexity under the base model: the other head's replies over the first head's.
        first_forwards_per_token: Tokens the model was run on for one token of a reply, under the first head.
        other_forwards_per_token: The same under the other head.
    """

    first: str
    other: str
    num_prompts: int
    num_changed: int
    rewards: dict[str, ScoreDifference]
    perplexity_ratio: Interval
    first_forwards_per_token: float
    other_forwards_per_token: float


def compare_heads(first: Evaluation, other: Evaluation, seed: int = 0) -> HeadComparison:
    """Compare the gated replies of two evaluations, prompt by prompt.

    Each head has the candidates and the system prompt that it was trained with, unless the evaluations set them.

    Args:
        first: Evaluation of one head.
        other: Evaluation of another head on the same model, with the same prompts, seed, temperature and length.
        seed: Seed of the intervals.

    Raises:
        ConfigError: If models, prompts or these settings differ.
    """
    _check_same_conditions(first, other)
    pairs = list(zip(first.examples, other.examples, strict=True))
    return HeadComparison(
        first=first.head,
        other=other.head,
        num_prompts=len(pairs),
        num_changed=sum(a.gated.token_ids != b.gated.token_ids for a, b in pairs),
        rewards={
            name: _difference([a.gated.scores[name] for a, _ in pairs], [b.gated.scores[name] for _, b in pairs], seed)
            for name in first.rewards
            if name in other.rewards
        },
        perplexity_ratio=perplexity_ratio(
            [a.gated.log_probs for a, _ in pairs], [b.gated.log_probs for _, b in pairs], seed
        ),
        first_forwards_per_token=first.gated.forwards_per_token,
        other_forwards_per_token=other.gated.forwards_per_token,
    )


def _difference(first_scores: list[float | None], other_scores: list[float | None], seed: int) -> ScoreDifference:
    first, other, num_dropped = opinions(first_scores, other_scores)
    if not first:
        return ScoreDifference(0, num_dropped)
    wins, ties, losses = win_counts(first, other)
    return ScoreDifference(
        num_pairs=len(first),
        num_dropped=num_dropped,
        first_mean=math.fsum(first) / len(first),
        other_mean=math.fsum(other) / len(other),
        difference=paired_bootstrap(first, other, seed),
        wins=wins,
        ties=ties,
        losses=losses,
    )


def _check_same_conditions(first: Evaluation, other: Evaluation) -> None:
    conditions = [
        {
            "model": each.model,
            "temperature": each.sampling.temperature,
            "max_new_tokens": each.sampling.max_new_tokens,
            "prompts": [example.prompt for example in each.examples],
            "seed": [example.seed for example in each.examples],
        }
        for each in (first, other)
    ]
    for name, value in conditions[0].items():
        if conditions[1][name] != value:
            raise ConfigError(
                f"the evaluations of {first.head!r} and {other.head!r} differ in {name}",
                hint="evaluate both heads on the same model, with the same prompts and settings",
            )
