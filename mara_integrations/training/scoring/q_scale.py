"""The scale of a Q-head by the KL a token, which is known exactly; and what greedy decoding may take of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from mara_integrations.engine.gate import weighted_kl
from mara_integrations.evaluation.metrics import distinct_n, perplexity_ratio
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.messages import Conversation
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import distinct_prompts
from mara_integrations.training.collect.workload import Generation
from mara_integrations.training.context import Run
from mara_integrations.training.rollouts.positions import Positions, all_scores
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.scoring.scale import (
    MAX_SCALE,
    SEED_OFFSET,
    largest_within,
    report_scale,
    set_scale,
)

_NUM_PROMPTS, _STAGE = 48, "replies to calibrate on"
# Replies may have this perplexity, and this share of distinct pairs of tokens, relative to the base model's.
MAX_PERPLEXITY_RATIO, MIN_DISTINCT_RATIO = 1.15, 0.95
# What they lose grows with about this power of the strength, measured on SmolLM2-135M; from the second trial on, what
# the trials tell of it counts, within bounds.
_GROWTH, _MIN_GROWTH, _MAX_GROWTH = 2.8, 1.5, 5.0
_TRIALS = 2
_LEAST_LOSS = 0.1  # a loss below this is as good as none, and none has a logarithm


def kl_per_token(positions: Positions, scores: Tensor, scale: float) -> float:
    """Return KL(gate || base) a token at a scale, in nats; positions with a lone candidate count and cost nothing."""
    kl = weighted_kl(positions.log_probs, scores, scale, positions.live)
    return float(kl.sum()) / max(1, positions.num_tokens)


def scale_within_budget(run: Run, head: QHead, positions: Positions) -> float:
    """Return the largest scale within the KL budget at these positions, and within the bound of the method."""
    assert run.kl_budget is not None, "there is a budget"
    scores = all_scores(head, positions, run.backend.output_embeddings)
    found = largest_within(lambda scale: kl_per_token(positions, scores, scale), run.kl_budget)
    return min(found, run.plan.method.max_scale or MAX_SCALE)


def calibrate_q(run: Run, head: QHead) -> float:
    """Set the scale and the greedy strength of a Q-head, and return KL(gate || base), in nats a token.

    The largest scale within the KL budget is found on replies of the base model, then checked on the gated model's own.
    Replies keep perplexity and variety, as they do after `rounds`.
    """
    prompts, seed = _prompts_to_calibrate_on(run), run.config.seed + SEED_OFFSET
    base = generate_replies(run, f"base {_STAGE}", prompts, 1, seed, run.new_head().eval(), is_base=True)
    scale = scale_within_budget(run, head, Positions.of(base))
    set_scale(head, scale)
    gated = generate_replies(run, f"gated {_STAGE}", prompts, 1, seed, head)
    positions = Positions.of(gated)
    set_scale(head, min(scale, scale_within_budget(run, head, positions)))
    hold_sampled_quality(run, head, scale, base, gated)
    hold_greedy_quality(run, head, prompts, seed)
    kl = kl_per_token(positions, all_scores(head, positions, run.backend.output_embeddings), head.config.scale)
    report_scale(run, head.config.scale, kl)
    return kl


def work_of_calibration(run: Run) -> list[Generation]:
    """Return what `calibrate_q` will generate at most."""
    prompts, seed = _prompts_to_calibrate_on(run), run.config.seed + SEED_OFFSET
    base = Generation(prompts, 1, seed, is_gated=True, is_base=True)
    return [base, replace(base, is_base=False), *greedy_generations(run, prompts, seed)]


def _prompts_to_calibrate_on(run: Run) -> list[Conversation]:
    """Return held-out prompts; where they are few, others too, since what few replies lose is mostly chance."""
    others, held_out = (distinct_prompts(run, data) for data in run.plan.prompts)
    chosen = run.random().sample(held_out, min(_NUM_PROMPTS, len(held_out)))
    return chosen + run.random().sample(others, min(_NUM_PROMPTS - len(chosen), len(others)))


def hold_sampled_quality(run: Run, head: QHead, scale: float, base: Sequence[Reply], gated: Sequence[Reply]) -> None:
    """Lower the scale to where sampled replies to held-out prompts keep perplexity and variety.

    Args:
        run: The run.
        head: Its scale is changed in place.
        scale: Scale at which the gated replies were sampled.
        base: Replies of the base model to the same prompts, with the same random numbers.
        gated: Replies of the head.
    """
    held = scale_of_quality(run, scale, base, gated)
    if held < head.config.scale:
        run.say(f"  so that sampled replies keep perplexity and variety, the scale is {held:.2f}, not {scale:.2f}")
        set_scale(head, held)


def scale_of_quality(run: Run, scale: float, base: Sequence[Reply], gated: Sequence[Reply]) -> float:
    """Return the largest scale, up to this one, at which sampled replies keep perplexity and variety.

    Nothing is generated: what the replies lose is known at one scale, and how it grows is known from other heads. A
    budget that the user has named is kept to instead. Arguments as in `hold_sampled_quality`.
    """
    if run.config.kl_budget is not None:
        return scale
    loss = max(quality_losses(*quality_ratios(base, gated)))
    return scale * math.pow(max(loss, 1.0), -1.0 / _GROWTH)


def hold_greedy_quality(run: Run, head: QHead, prompts: Sequence[Conversation], seed: int) -> None:
    """Set the strength of greedy requests so that greedy replies to held-out prompts keep perplexity and variety.

    What a KL budget allows where replies are sampled can make greedy ones repeat themselves: there every token is the
    most probable one under the gate. A budget that the user has named is kept to instead.

    Args:
        run: The run.
        head: Its `greedy_strength` is changed in place.
        prompts: Held-out prompts.
        seed: Names the replies in the cache; greedy ones draw nothing.
    """
    if run.config.kl_budget is not None:
        return
    untrained, trials = run.new_head().eval(), itertools.count(1)

    def greedy(stage: str, gating_head: MARAHead, *, is_base: bool = False) -> list[Reply]:
        return generate_replies(run, stage, prompts, 1, seed, gating_head, is_base=is_base, temperature=0.0)

    base = greedy("held-out greedy base replies", untrained, is_base=True)

    def losses_at(strength: float) -> tuple[float, float]:
        _set_greedy_strength(head, strength)
        perplexity, variety = quality_ratios(base, greedy(f"held-out greedy replies {next(trials)}", head))
        run.log("greedy quality", strength=strength, perplexity_ratio=perplexity, distinct_2_ratio=variety)
        run.say(
            f"  greedy replies at strength {strength:.2f}: perplexity x {perplexity:.2f}, "
            f"distinct pairs of tokens x {variety:.2f}"
        )
        return quality_losses(perplexity, variety)

    strength, is_kept = strength_within_losses(losses_at)
    _set_greedy_strength(head, strength)
    run.say(f"  greedy requests have strength {strength:.2f}, if they name no other")
    if not is_kept:
        run.say("  [yellow]at every strength tried greedy replies lost more than they may[/]")


def _set_greedy_strength(head: MARAHead, strength: float) -> None:
    head.config = head.config.model_copy(update={"greedy_strength": strength})


def greedy_generations(run: Run, prompts: Sequence[Conversation], seed: int) -> list[Generation]:
    """Return what `hold_greedy_quality` will generate, if full strength is too much."""
    if run.config.kl_budget is not None:
        return []
    base = Generation(list(prompts), 1, seed, is_gated=True, is_base=True, temperature=0.0)
    return [base, *[replace(base, is_base=False)] * _TRIALS]


def quality_ratios(base: Sequence[Reply], gated: Sequence[Reply]) -> tuple[float, float]:
    """Return perplexity under the base model, and share of distinct pairs of tokens, of gated replies over base ones.

    Args:
        base: Replies of the base model, one or more a prompt.
        gated: Replies of the head to the same prompts.
    """
    perplexity = perplexity_ratio([reply.log_probs for reply in base], [reply.log_probs for reply in gated])
    of_base, of_gated = (distinct_n([reply.token_ids for reply in side]) for side in (base, gated))
    return perplexity.mean, of_gated / of_base if of_base else 1.0


def quality_losses(perplexity_ratio: float, distinct_ratio: float) -> tuple[float, float]:
    """Return what replies lose of each measure, as a share of what they may lose: up to 1 is within the bound.

    Args:
        perplexity_ratio: Perplexity of the gated replies over that of the base replies.
        distinct_ratio: The same of distinct pairs of tokens.
    """
    return (
        math.log(perplexity_ratio) / math.log(MAX_PERPLEXITY_RATIO),
        (1.0 - distinct_ratio) / (1.0 - MIN_DISTINCT_RATIO),
    )


def strength_within_losses(losses_at: Callable[[float], Sequence[float]]) -> tuple[float, bool]:
    """Return the largest strength at which no loss is above 1, and whether each was seen to be so; at most 1.

    Few replies tell a loss: what all trials say of it together counts, not whether the last one was lucky.

    Args:
        losses_at: Losses at a strength, each of which grows with it as a power; called once a trial.
    """
    tried: list[float] = []  # logarithms of the strengths
    trials: list[Sequence[float]] = []
    strength = 1.0
    for _ in range(_TRIALS):
        losses = losses_at(strength)
        if not trials and max(losses) <= 1.0:
            return 1.0, True
        tried.append(math.log(strength))
        trials.append(losses)
        logs = [[math.log(max(loss, _LEAST_LOSS)) for loss in measure] for measure in zip(*trials, strict=True)]
        strength = math.exp(min(0.0, *(_root(tried, values) for values in logs)))
    return strength, all(min(measure) <= 1.0 for measure in zip(*trials, strict=True))


def _root(x: Sequence[float], y: Sequence[float]) -> float:
    """Return where the line through points is 0; its slope is that of least squares, within bounds."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((value - mean_x) ** 2 for value in x)
    product = sum((one - mean_x) * (other - mean_y) for one, other in zip(x, y, strict=True))
    slope = product / spread if spread > 0 else _GROWTH
    return mean_x - mean_y / min(max(slope, _MIN_GROWTH), _MAX_GROWTH)
