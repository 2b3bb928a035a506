"""How far greedy requests follow a Q-head: as far as their replies keep perplexity and variety.

What a KL budget allows where replies are sampled can make greedy ones repeat themselves: there every token is the most
probable one under the gate. Two settings hold a head back at temperature 0. A lower strength leaves out its weak
preferences. A lower top-p leaves it out wherever the base model is sure of its token, and keeps the strength elsewhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from mara_integrations.engine.candidates import keep_top_p
from mara_integrations.engine.gate import weighted_log_probs
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.messages import Conversation
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.workload import Generation
from mara_integrations.training.context import Run
from mara_integrations.training.rollouts.positions import Positions, all_scores
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.scoring.quality import quality_losses, quality_ratios

# Less than sampled replies keep: what greedy ones share are phrases of the manner that was asked for.
MIN_GREEDY_DISTINCT_RATIO = 0.9
# A lower strength is chosen where it gains more than this many times what a lower top-p does. On SmolLM2-135M replies
# were better by the lower top-p, or no different, where both gain about as much; a rule that the base model breaks
# where it is sure gains three times as much by the lower strength.
_LEAD = 1.5
_TRIALS = 2
# What greedy replies lose grows with about this power of either setting, measured on SmolLM2-135M. From the second
# trial on, what the trials tell of it counts, within bounds.
_GROWTH, _MIN_GROWTH, _MAX_GROWTH = 2.3, 1.5, 5.0
_LEAST_LOSS = 0.1  # a loss below this is as good as none, and none has a logarithm


class GreedySettings(NamedTuple):
    """Settings of requests at temperature 0.

    Attributes:
        strength: Strength of the head.
        top_p: Share of the probability that the candidates hold.
    """

    strength: float
    top_p: float


def hold_greedy_quality(run: Run, head: QHead, prompts: Sequence[Conversation], seed: int) -> None:
    """Set strength and top-p of greedy requests so that greedy replies to held-out prompts keep perplexity and variety.

    The largest strength at the head's own top-p is found, and the largest top-p at full strength; the one by which more
    is gained is kept. A budget that the user has named is kept to instead.

    Args:
        run: The run.
        head: Its `greedy_strength` and `greedy_top_p` are changed in place.
        prompts: Held-out prompts.
        seed: Names the replies in the cache; greedy ones draw nothing.
    """
    if run.config.kl_budget is not None:
        return
    untrained, trials = run.new_head().eval(), itertools.count(1)

    def greedy(stage: str, gating_head: MARAHead, *, is_base: bool = False) -> list[Reply]:
        return generate_replies(run, stage, prompts, 1, seed, gating_head, is_base=is_base, temperature=0.0)

    base = greedy("held-out greedy base replies", untrained, is_base=True)

    @cache
    def losses_at(settings: GreedySettings) -> tuple[float, float]:
        _set(head, settings)
        perplexity, variety = quality_ratios(base, greedy(f"held-out greedy replies {next(trials)}", head))
        run.log("greedy quality", **settings._asdict(), perplexity_ratio=perplexity, distinct_2_ratio=variety)
        run.say(
            f"  greedy replies at {_shown(settings)}: perplexity x {perplexity:.2f}, "
            f"distinct pairs of tokens x {variety:.2f}"
        )
        return quality_losses(perplexity, variety, MIN_GREEDY_DISTINCT_RATIO)

    full = GreedySettings(1.0, head.config.top_p)
    weaker, is_weaker_kept = share_within_losses(lambda share: losses_at(full._replace(strength=share)))
    narrower, is_narrower_kept = share_within_losses(lambda share: losses_at(full._replace(top_p=share * full.top_p)))
    by_strength, by_top_p = full._replace(strength=weaker), full._replace(top_p=narrower * full.top_p)
    gain = _gain_on(run, head, Positions.of(base))
    is_narrowed = gain(by_strength) <= _LEAD * gain(by_top_p)
    chosen, is_kept = (by_top_p, is_narrower_kept) if is_narrowed else (by_strength, is_weaker_kept)
    _set(head, chosen)
    run.say(f"  greedy requests have {_shown(chosen)}, if they name no strength")
    if not is_kept:
        run.say("  [yellow]this is an estimate: at the settings tried, greedy replies lost more than they may[/]")


def greedy_generations(run: Run, prompts: Sequence[Conversation], seed: int) -> list[Generation]:
    """Return what `hold_greedy_quality` will generate, if full strength is too much."""
    if run.config.kl_budget is not None:
        return []
    base = Generation(list(prompts), 1, seed, is_gated=True, is_base=True, temperature=0.0)
    return [base, *[replace(base, is_base=False)] * (1 + 2 * (_TRIALS - 1))]


def _set(head: MARAHead, settings: GreedySettings) -> None:
    changed = {"greedy_strength": settings.strength, "greedy_top_p": settings.top_p}
    head.config = head.config.model_copy(update=changed)


def _shown(settings: GreedySettings) -> str:
    return f"strength {settings.strength:.2f} and top-p {settings.top_p:.2f}"


def _gain_on(run: Run, head: QHead, positions: Positions) -> Callable[[GreedySettings], float]:
    """Return what tells how much a token gains, in the head's own scores, by settings of greedy requests."""
    scores = head.config.scale * all_scores(head, positions, run.backend.output_embeddings)
    floor = torch.full((len(positions), 1), head.config.min_candidates)

    def gain(settings: GreedySettings) -> float:
        taken = greedy_choices(positions.log_probs, scores, settings, floor)
        of_taken = scores.gather(1, taken[:, None])[:, 0]
        return float((of_taken - scores[:, 0]).sum()) / max(1, positions.num_tokens)

    return gain


def greedy_choices(log_probs: Tensor, scores: Tensor, settings: GreedySettings, floor: Tensor) -> Tensor:
    """Return the column that the gate takes at temperature 0, (P,).

    Args:
        log_probs: Log-probabilities of candidates among themselves, highest first, -inf where there is none, (P, K).
        scores: Their scores, (P, K).
        settings: The settings.
        floor: Candidates that are kept whatever top-p says, (P, 1).
    """
    kept, _ = keep_top_p(log_probs, torch.full_like(log_probs[:, :1], 1.0 - settings.top_p), floor)
    return weighted_log_probs(log_probs, scores, settings.strength, kept).argmax(-1)


def share_within_losses(losses_at: Callable[[float], Sequence[float]]) -> tuple[float, bool]:
    """Return the largest share of a setting at which no loss is above 1, and whether each was seen to be so; at most 1.

    Few replies tell a loss: what all trials say of it together counts, not whether the last one was lucky.

    Args:
        losses_at: Losses at a share, each of which grows with it as a power; called once a trial.
    """
    tried: list[float] = []  # logarithms of the shares
    trials: list[Sequence[float]] = []
    share = 1.0
    for _ in range(_TRIALS):
        losses = losses_at(share)
        if not trials and max(losses) <= 1.0:
            return 1.0, True
        tried.append(math.log(share))
        trials.append(losses)
        logs = [[math.log(max(loss, _LEAST_LOSS)) for loss in measure] for measure in zip(*trials, strict=True)]
        share = math.exp(min(0.0, *(_root(tried, values) for values in logs)))
    return share, all(min(measure) <= 1.0 for measure in zip(*trials, strict=True))


def _root(x: Sequence[float], y: Sequence[float]) -> float:
    """Return where the line through points is 0; its slope is that of least squares, within bounds."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((value - mean_x) ** 2 for value in x)
    product = sum((one - mean_x) * (other - mean_y) for one, other in zip(x, y, strict=True))
    slope = product / spread if spread > 0 else _GROWTH
    return mean_x - mean_y / min(max(slope, _MIN_GROWTH), _MAX_GROWTH)
