"""A head on held-out prompts, as training goes on: its replies against the base model's, and the pairs it orders.

Base and gated replies use common random numbers. The rounds of a method generate them anyway; nothing is generated for
the comparison alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.markup import escape

from mara_integrations.data import Dataset
from mara_integrations.engine.gate import weighted_kl
from mara_integrations.evaluation.metrics import (
    Interval,
    distinct_n,
    opinions,
    paired_bootstrap,
    perplexity_ratio,
    preference_interval,
    wilson,
)
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.messages import Conversation
from mara_integrations.rewards import Reward, Scores
from mara_integrations.training.collect.rewards import score_replies
from mara_integrations.training.context import Run
from mara_integrations.training.learning.fit import outputs
from mara_integrations.training.rollouts.decisions import decisions_of
from mara_integrations.training.rollouts.positions import Positions, all_scores
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.scoring.scale import decisions_kl


@dataclass(frozen=True, slots=True)
class RewardChange:
    """How one reward differs between gated replies and base replies.

    Attributes:
        gated_mean: Mean reward of the gated replies.
        difference: Mean of gated less base.
        preference: Preference rate, (wins - losses) / N: a win is a gated reply with a higher reward than base.
    """

    gated_mean: float
    difference: Interval
    preference: Interval


@dataclass(frozen=True, slots=True)
class HeldOutComparison:
    """Gated replies against base replies on held-out prompts.

    Attributes:
        rewards: Change of each reward, by name; without rewards that have no opinion on both replies to any prompt.
        perplexity_ratio: Perplexity under the base model, gated over base.
        distinct_2_ratio: Share of distinct pairs of neighbouring tokens, gated over base.
        kl_per_token: KL(gate || base) on the gated replies, in nats a token.
        forced: Share of tokens that were taken without asking the head: the last candidate left, or the only one.
        candidates_per_token: Candidates that were fed for each token; a lone candidate counts.
    """

    rewards: dict[str, RewardChange]
    perplexity_ratio: Interval
    distinct_2_ratio: float
    kl_per_token: float
    forced: float
    candidates_per_token: float


def compare_held_out(
    run: Run,
    rewards: Mapping[str, Reward],
    data: Dataset,
    prompts: Sequence[Conversation],
    base: Sequence[Reply],
    gated: Sequence[Reply],
    head: MARAHead,
) -> HeldOutComparison:
    """Compare replies to the same prompts with the same random numbers.

    Args:
        run: The run.
        rewards: Rewards to compare by, by name.
        data: Rows of the prompts.
        prompts: The prompts that `Reply.prompt_index` counts.
        base: Replies of the base model.
        gated: Replies of the head, which has the residual or the q form, with their positions.
        head: The head.
    """

    def scored(reward: Reward, replies: Sequence[Reply]) -> Scores:
        return score_replies(run, data, prompts, replies, reward=reward)

    scores = {name: (scored(reward, base), scored(reward, gated)) for name, reward in rewards.items()}
    return compare_scored(run, scores, base, gated, head)


def compare_scored(
    run: Run,
    scores: Mapping[str, tuple[Scores, Scores]],
    base: Sequence[Reply],
    gated: Sequence[Reply],
    head: MARAHead,
) -> HeldOutComparison:
    """Compare replies by scores of the base and of the gated ones, by name; arguments as in `compare_held_out`."""
    scored = {name: opinions(*of_sides) for name, of_sides in scores.items()}
    num_tokens = sum(len(reply.token_ids) for reply in gated)
    kl, accepted, candidates = _gate_figures(run, head, gated)
    lone = num_tokens - sum(len(reply.positions) for reply in gated)
    distinct = [distinct_n([reply.token_ids for reply in side]) for side in (base, gated)]
    return HeldOutComparison(
        rewards={
            name: RewardChange(
                statistics.fmean(of_gated), paired_bootstrap(of_base, of_gated), preference_interval(of_base, of_gated)
            )
            for name, (of_base, of_gated, _) in scored.items()
            if of_gated
        },
        perplexity_ratio=perplexity_ratio([reply.log_probs for reply in base], [reply.log_probs for reply in gated]),
        distinct_2_ratio=distinct[1] / distinct[0] if distinct[0] else 1.0,
        kl_per_token=kl / num_tokens,
        forced=1.0 - accepted / num_tokens,
        candidates_per_token=(candidates + lone) / num_tokens,
    )


@torch.inference_mode()
def _gate_figures(run: Run, head: MARAHead, gated: Sequence[Reply]) -> tuple[float, int, int]:
    """Return KL(gate || base), tokens that the head decided about, and candidates fed, summed over gated replies."""
    scale = head.config.scale
    if isinstance(head, QHead):
        positions = Positions.of(gated)
        scores = all_scores(head, positions, run.backend.output_embeddings)
        kl = float(weighted_kl(positions.log_probs, scores, scale, positions.live).sum())
        return kl, int((positions.taken < positions.live.sum(-1) - 1).sum()), len(positions)
    decisions = decisions_of(gated)
    kl = decisions_kl(decisions, outputs(head, decisions.states), scale, scale)
    fed = sum(len(position.states) for reply in gated for position in reply.positions)
    return kl, int(decisions.accepted.sum()), fed


def report_comparison(run: Run, name: str, comparison: HeldOutComparison) -> None:
    """Log a comparison and say it in a line."""
    run.log("held-out comparison", stage=name, **asdict(comparison))
    parts = [
        f"{reward} {change.gated_mean:+.3f} ({_interval(change.difference)} against base, preference rate "
        f"{_interval(change.preference)})"
        for reward, change in comparison.rewards.items()
    ]
    parts += [
        f"perplexity x {comparison.perplexity_ratio.mean:.2f}",
        f"distinct pairs of tokens x {comparison.distinct_2_ratio:.2f}",
        f"KL {comparison.kl_per_token:.3f} nats a token",
        f"{comparison.candidates_per_token:.1f} candidates a token",
    ]
    run.say(f"  {escape(name)}, held-out prompts: {escape(', '.join(parts))}")


def ordered_pairs(
    prompts: Sequence[int], values: Sequence[float], targets: Sequence[float]
) -> list[tuple[float, float]]:
    """Return the values of pairs of a better and a worse reply to one prompt: best with worst, and so inwards.

    Where every prompt has one reply, all replies are paired as if they answered one prompt.

    Args:
        prompts: Index of the prompt of each reply.
        values: Value of each reply under a head.
        targets: Label or reward of each reply.
    """
    by_prompt: dict[int, list[tuple[float, float]]] = {}
    for prompt, value, target in zip(prompts, values, targets, strict=True):
        by_prompt.setdefault(prompt, []).append((target, value))
    if all(len(group) == 1 for group in by_prompt.values()):
        by_prompt = {0: [item for group in by_prompt.values() for item in group]}
    return [
        (better[1], worse[1])
        for group in by_prompt.values()
        for better, worse in zip(sorted(group)[::-1], sorted(group), strict=True)
        if better[0] > worse[0]
    ]


def report_pair_accuracy(
    run: Run, prompts: Sequence[int], values: Sequence[float], targets: Sequence[float]
) -> Interval | None:
    """Log, say and return the share of held-out pairs that a head orders correctly; see `ordered_pairs`."""
    pairs = ordered_pairs(prompts, values, targets)
    if not pairs:
        return None
    num_correct = sum(better > worse for better, worse in pairs)
    accuracy = wilson(num_correct, len(pairs))
    run.log("held-out accuracy", pairs=len(pairs), accuracy=asdict(accuracy))
    run.say(f"  the head orders {num_correct} of {len(pairs)} held-out pairs correctly: {shown_accuracy(accuracy)}")
    return accuracy


def reward_accuracy(reward: Callable[..., list[float]], pairs: Sequence[tuple[str, str]]) -> Interval:
    """Return the share of pairs of a better and a worse reply that a reward orders correctly; ties count as wrong."""
    better, worse = (reward([pair[i] for pair in pairs]) for i in (0, 1))
    return wilson(sum(b > w for b, w in zip(better, worse, strict=True)), len(pairs))


def shown_accuracy(accuracy: Interval) -> str:
    """Return an accuracy with its interval as text, with a warning where it may be chance; rich's markup."""
    interval = escape(f"{accuracy.mean:.2f} [{accuracy.low:.2f}, {accuracy.high:.2f}]")
    return interval + (" [yellow]not distinguishable from chance[/]" if accuracy.low <= 0.5 else "")


def _interval(interval: Interval) -> str:
    return f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"
