"""How far greedy requests follow a Q-head: as far as their replies keep perplexity and variety.

What a KL budget allows where replies are sampled can make greedy ones repeat themselves: there every token is the most
probable one under the gate. Two settings hold a head back at temperature 0. A lower strength leaves out its weak
preferences, which keeps perplexity. A lower top-p leaves it out wherever the base model is sure of its token, and keeps
the strength elsewhere: so replies stay as different as the base model's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.messages import Conversation
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.workload import Generation
from mara_integrations.training.context import Run
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.scoring.quality import quality_losses, quality_ratios

# Less than sampled replies keep: what greedy ones share are phrases of the manner that was asked for.
MIN_GREEDY_DISTINCT_RATIO = 0.9
_VARIETY = 1  # among the losses, see `quality_losses`
_TRIALS = 2
# What greedy replies lose grows with about this power of either setting, measured on SmolLM2-135M. From the second
# trial on, what the trials tell of it counts, within bounds. Variety comes back slowly as the strength falls: the
# strongest preferences, which cost it most, go last.
_GROWTH, _MAX_GROWTH = 2.3, 5.0
_MIN_GROWTHS = (1.5, 0.7)  # of perplexity, and of variety
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

    The strength is lowered. Where variety is what limits it, the top-p is lowered instead, at full strength. A budget
    that the user has named is kept to instead of either.

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
    held = share_within_losses(lambda share: losses_at(full._replace(strength=share)))
    chosen = full._replace(strength=held.share)
    if held.limit == _VARIETY:
        held = share_within_losses(lambda share: losses_at(full._replace(top_p=share * full.top_p)))
        chosen = full._replace(top_p=held.share * full.top_p)
    _set(head, chosen)
    run.say(f"  greedy requests have {_shown(chosen)}, if they name no strength")
    if not held.is_seen:
        run.say("  [yellow]this is an estimate: at the settings tried, greedy replies lost more than they may[/]")


def greedy_generations(run: Run, prompts: Sequence[Conversation], seed: int) -> list[Generation]:
    """Return what `hold_greedy_quality` will generate, if full strength is too much."""
    if run.config.kl_budget is not None:
        return []
    base = Generation(list(prompts), 1, seed, is_gated=True, is_base=True, temperature=0.0)
    return [base, *[replace(base, is_base=False)] * (2 * _TRIALS - 1)]


def _set(head: MARAHead, settings: GreedySettings) -> None:
    changed = {"greedy_strength": settings.strength, "greedy_top_p": settings.top_p}
    head.config = head.config.model_copy(update=changed)


def _shown(settings: GreedySettings) -> str:
    return f"strength {settings.strength:.2f} and top-p {settings.top_p:.2f}"


class Held(NamedTuple):
    """How far a setting may go.

    Attributes:
        share: Share of its full value, at most 1.
        limit: Index of the loss that allows no more; None where nothing does.
        is_seen: True if every loss was within its bound in at least one trial.
    """

    share: float
    limit: int | None
    is_seen: bool


def share_within_losses(losses_at: Callable[[float], tuple[float, float]]) -> Held:
    """Return the largest share of a setting at which no loss is above 1.

    Few replies tell a loss: what all trials say of it together counts, not whether the last one was lucky.

    Args:
        losses_at: Returns what replies lose of perplexity and of variety at a share, see `quality_losses`. Each loss is
            taken to grow as a power of the share. Called once a trial.
    """
    tried: list[float] = []  # logarithms of the shares
    trials: list[tuple[float, float]] = []
    share, roots = 1.0, [0.0]
    for _ in range(_TRIALS):
        losses = losses_at(share)
        if not trials and max(losses) <= 1.0:
            return Held(1.0, None, True)
        tried.append(math.log(share))
        trials.append(losses)
        logs = [[math.log(max(loss, _LEAST_LOSS)) for loss in measure] for measure in zip(*trials, strict=True)]
        roots = [_root(tried, values, least) for values, least in zip(logs, _MIN_GROWTHS, strict=True)]
        share = math.exp(min(0.0, *roots))
    return Held(share, roots.index(min(roots)), all(min(measure) <= 1.0 for measure in zip(*trials, strict=True)))


def _root(x: Sequence[float], y: Sequence[float], least: float) -> float:
    """Return where the line through points is 0; its slope is that of least squares, at least `least`."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((value - mean_x) ** 2 for value in x)
    product = sum((one - mean_x) * (other - mean_y) for one, other in zip(x, y, strict=True))
    slope = product / spread if spread > 0 else _GROWTH
    return mean_x - mean_y / min(max(slope, least), _MAX_GROWTH)
