"""What a head does to held-out replies, as training goes on: judged against the base model's, on common random numbers.

The rounds of a method write these replies anyway; nothing is generated for the judging alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.markup import escape

from mara_integrations.data import Dataset
from mara_integrations.evaluation.metrics import (
    Interval,
    distinct_n,
    opinions,
    paired_bootstrap,
    perplexity_ratio,
    preference_interval,
)
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Conversation
from mara_integrations.rewards import Reward
from mara_integrations.training import gather
from mara_integrations.training.context import Run
from mara_integrations.training.learning.fit import outputs
from mara_integrations.training.rollouts.decisions import decisions_taken
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.scoring.scale import decisions_kl


@dataclass(frozen=True, slots=True)
class Opinion:
    """What one reward says of gated replies against base replies.

    Attributes:
        gated_mean: Of the gated replies.
        difference: Mean of gated - base.
        preference: (wins - losses) / N.
    """

    gated_mean: float
    difference: Interval
    preference: Interval


@dataclass(frozen=True, slots=True)
class Judgement:
    """A head on held-out prompts.

    Attributes:
        opinions: Of each reward, by name, the one trained for first; without those that have none.
        perplexity_ratio: Under the base model, gated over base.
        distinct_2_ratio: Gated over base.
        kl_per_token: KL(gate || base) on the gated replies, in nats.
        forced: Share of tokens that were the last candidate left, or the only one.
        visits_per_token: Candidates the gate looked at, a lone one counted.
    """

    opinions: dict[str, Opinion]
    perplexity_ratio: Interval
    distinct_2_ratio: float
    kl_per_token: float
    forced: float
    visits_per_token: float


def judge(
    run: Run,
    rewards: Mapping[str, Reward],
    data: Dataset,
    prompts: Sequence[Conversation],
    base: Sequence[Reply],
    gated: Sequence[Reply],
    head: MARAHead,
) -> Judgement:
    """Compare replies to the same prompts with the same random numbers.

    Args:
        run: The run.
        rewards: Judges, by name.
        data: Where the prompts come from.
        prompts: That `Reply.prompt` counts.
        base: Of the base model.
        gated: Of the head, of the residual form, their positions kept.
        head: That wrote them.
    """
    said = {
        name: opinions(*(gather.scores(run, data, prompts, side, reward=reward) for side in (base, gated)))
        for name, reward in rewards.items()
    }
    decisions, num_tokens = decisions_taken(gated), sum(len(reply.token_ids) for reply in gated)
    scale = head.config.scale
    with torch.inference_mode():
        kl = decisions_kl(decisions, outputs(head, decisions.states), scale, scale)
    visited = sum(len(position.states) for reply in gated for position in reply.positions)
    lone = num_tokens - sum(len(reply.positions) for reply in gated)
    accepted = int(decisions.accepted.sum())
    distinct = [distinct_n([reply.token_ids for reply in side]) for side in (base, gated)]
    return Judgement(
        {
            name: Opinion(statistics.fmean(ours), paired_bootstrap(theirs, ours), preference_interval(theirs, ours))
            for name, (theirs, ours, _) in said.items()
            if ours
        },
        perplexity_ratio([reply.log_probs for reply in base], [reply.log_probs for reply in gated]),
        distinct[1] / distinct[0] if distinct[0] else 1.0,
        kl / num_tokens,
        1.0 - accepted / num_tokens,
        (visited + lone) / num_tokens,
    )


def report(run: Run, name: str, judgement: Judgement) -> None:
    """Log a judgement and say it in a line."""
    run.log("judgement", stage=name, **asdict(judgement))
    parts = [
        f"{reward} {opinion.gated_mean:+.3f} ({_interval(opinion.difference)} to base, "
        f"preferred {_interval(opinion.preference)})"
        for reward, opinion in judgement.opinions.items()
    ]
    parts += [
        f"perplexity x {judgement.perplexity_ratio.mean:.2f}",
        f"distinct-2 x {judgement.distinct_2_ratio:.2f}",
        f"KL {judgement.kl_per_token:.3f}",
        f"{judgement.visits_per_token:.1f} candidates a token",
    ]
    run.say(f"  {escape(name)}: {escape(', '.join(parts))}")


def _interval(interval: Interval) -> str:
    return f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"
