"""The scale of a Q-head: by the KL a token, which is known exactly, and by what greedy decoding makes of the text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from torch import Tensor

from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.gate import weighted_kl
from mara_integrations.evaluation.metrics import distinct_n, perplexity_ratio
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.messages import Conversation
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import distinct_prompts
from mara_integrations.training.context import Run
from mara_integrations.training.rollouts.positions import Positions, all_scores
from mara_integrations.training.scoring.scale import (
    MAX_SCALE,
    largest_within,
    replies_to_scale_on,
    report_scale,
    set_scale,
)

_NUM_REPLIES = 24  # that a scale is calibrated on
# Greedy replies may have this perplexity, and this share of distinct pairs of tokens, relative to the base model's.
MAX_PERPLEXITY_RATIO, MIN_DISTINCT_RATIO = 1.2, 0.93
# Both worsen with about this power of the scale; measured on SmolLM2-135M.
_GROWTH, _TRIALS = 2.5, 3


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
    """Set the scale of a Q-head to the largest within the KL budget, and return the KL, in nats a token.

    Found on the base model's replies to held-out prompts, then checked on the gated model's own.
    """
    pool = distinct_prompts(run, run.plan.prompts[1])
    prompts = run.random().sample(pool, min(_NUM_REPLIES, len(pool)))
    untrained = MARAHead(head.config).to(run.model.device).eval()
    sampling = run.sampling(min_candidates=head.config.min_candidates)
    gating_heads = [head] if run.kl_budget is None else [untrained, head]
    scale, kl = head.config.scale, 0.0
    with run.stage("calibration of the scale", len(gating_heads) * len(prompts)) as advance:
        for gating_head in gating_heads:
            replies = replies_to_scale_on(run, Decoder(run.backend), prompts, sampling, gating_head, advance)
            positions = Positions.of(replies)
            if run.kl_budget is not None:
                found = scale_within_budget(run, head, positions)
                scale = found if gating_head is untrained else min(scale, found)
                set_scale(head, scale)
            kl = kl_per_token(positions, all_scores(head, positions, run.backend.output_embeddings), scale)
    report_scale(run, scale, kl)
    return kl


def hold_quality(run: Run, head: QHead, prompts: Sequence[Conversation], seed: int) -> None:
    """Lower the scale until greedy replies to held-out prompts keep perplexity and variety.

    What a KL budget allows where replies are sampled can make greedy ones repeat themselves: there every token is the
    most probable one under the gate. A budget that the user has named is kept to instead.

    Args:
        run: The run.
        head: Its scale is changed in place.
        prompts: Held-out prompts.
        seed: Names the replies in the cache; greedy ones draw nothing.
    """
    if run.config.kl_budget is not None:
        return
    untrained = run.new_head().eval()

    def greedy(stage: str, gating_head: MARAHead, *, is_base: bool = False) -> tuple[list[tuple[float, ...]], float]:
        replies = generate_replies(run, stage, prompts, 1, seed, gating_head, is_base=is_base, temperature=0.0)
        return [reply.log_probs for reply in replies], distinct_n([reply.token_ids for reply in replies])

    base_log_probs, base_distinct = greedy("held-out greedy base replies", untrained, is_base=True)
    for trial in range(_TRIALS):
        log_probs, distinct = greedy(f"held-out greedy replies {trial + 1}", head)
        ratio = perplexity_ratio(base_log_probs, log_probs)
        variety = distinct / base_distinct if base_distinct else 1.0
        excess = max(
            math.log(ratio.mean) / math.log(MAX_PERPLEXITY_RATIO), (1.0 - variety) / (1.0 - MIN_DISTINCT_RATIO)
        )
        run.log("greedy quality", scale=head.config.scale, perplexity_ratio=asdict(ratio), distinct_2_ratio=variety)
        run.say(
            f"  greedy held-out replies at scale {head.config.scale:.2f}: perplexity x {ratio.mean:.2f}, "
            f"distinct pairs of tokens x {variety:.2f}"
        )
        if excess <= 1.0:
            return
        set_scale(head, head.config.scale * excess ** (-1.0 / _GROWTH))
