"""The scale of a Q-head by the KL a token, which is known exactly, and by what sampled replies lose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from mara_integrations.engine.gate import weighted_kl
from mara_integrations.heads.q import QHead
from mara_integrations.messages import Conversation
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import distinct_prompts
from mara_integrations.training.collect.workload import Generation
from mara_integrations.training.context import Run
from mara_integrations.training.rollouts.positions import Positions, all_scores
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.scoring.greedy import greedy_generations, hold_greedy_quality
from mara_integrations.training.scoring.quality import quality_losses, quality_ratios
from mara_integrations.training.scoring.scale import (
    MAX_SCALE,
    SEED_OFFSET,
    largest_within,
    report_scale,
    set_scale,
)

_NUM_PROMPTS, _STAGE = 48, "replies to calibrate on"
_GROWTH = 2.8  # what sampled replies lose grows with about this power of the scale, measured on SmolLM2-135M


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
    """Set scale and greedy settings of a Q-head, and return KL(gate || base), in nats a token.

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
