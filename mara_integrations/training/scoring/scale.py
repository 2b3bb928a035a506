"""The scale of a head: the largest factor of its score that keeps the gate within a KL budget of the base model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.gate import accept_logit, kl_to_base
from mara_integrations.engine.scheduler import Scheduler
from mara_integrations.engine.sequence import JudgedPosition
from mara_integrations.heads.afterstate import AfterstateHead
from mara_integrations.heads.head import MARAHead
from mara_integrations.sampling import HeadForm
from mara_integrations.training.collect.prompts import distinct_prompts
from mara_integrations.training.context import Run
from mara_integrations.training.learning.objectives import decision_kl
from mara_integrations.training.rollouts.decisions import Decisions
from mara_integrations.training.rollouts.replies import sample_replies

MAX_SCALE = 100.0
_NUM_REPLIES, _NUM_TOKENS = 12, 16  # that the scale is calibrated on
SEED_OFFSET = 7_000_000  # apart from the seeds of replies to learn from


def calibrate(run: Run, head: MARAHead) -> float:
    """Set the head's scale to the largest within the KL budget, and return the KL at that scale, in nats a token.

    The scale is found on the base model's replies and checked once on the gated model's, where the KL is higher.
    """
    pool = distinct_prompts(run, run.plan.train)
    prompts = run.random().sample(pool, min(_NUM_REPLIES, len(pool)))
    decoder = Decoder(run.backend, Scheduler(max_live=8, feeds_all=True))  # every candidate's state is needed
    assert isinstance(head, AfterstateHead), "heads of the form q have no candidates to feed, see `q_scale`"
    untrained = MARAHead(head.config).to(run.model.device).eval()
    sampling = run.sampling(
        max_new_tokens=min(_NUM_TOKENS, run.config.max_reply_tokens), min_candidates=head.config.min_candidates
    )
    bound = run.plan.method.max_scale or MAX_SCALE
    scale, kl = 1.0, 0.0
    with run.stage("calibration of the scale", 2 * len(prompts)) as advance:
        for gating_head in (untrained, head):
            replies = sample_replies(
                run.model,
                decoder,
                prompts,
                sampling=sampling,
                seed=run.config.seed + SEED_OFFSET,
                head=gating_head,
                keep_positions=True,
                on_reply=advance,
            )
            positions = [position for reply in replies for position in reply.positions]
            num_tokens = sum(len(reply.token_ids) for reply in replies)
            if not positions:
                break
            scored = score_positions(head, positions)
            if run.kl_budget is not None:
                found = min(scale_for_budget(scored, run.kl_budget, num_tokens), bound)
                scale = found if gating_head is untrained else min(scale, found)
            kl = float(scored.kl(scale).sum()) / num_tokens
            set_scale(head, scale)
    report_scale(run, scale, kl)
    return kl


def set_scale(head: MARAHead, scale: float) -> None:
    """Set the scale in a head's config."""
    head.config = head.config.model_copy(update={"scale": scale})


def report_scale(run: Run, scale: float, kl: float) -> None:
    """Log and say a scale and the KL at it."""
    if scale >= MAX_SCALE:
        run.say("  [yellow]the head hardly changes any token: its scale is at the upper bound[/]")
    run.log("scale", scale=scale, kl_per_token=kl, budget=run.kl_budget)
    bound = f"budget {run.kl_budget}" if run.kl_budget is not None else "no budget"
    run.say(f"  scale of the head {scale:.2f}; KL from the base model {kl:.3f} nats a token ({bound})")


def decisions_kl(decisions: Decisions, scores: Tensor, scale: float, sampled_at: float = 0.0) -> float:
    """Return KL(gate || base) of a residual head, in nats, summed over all tokens of replies that a gate has sampled.

    It needs only the candidates that were visited: the KL of each decision, weighted by how much more often the gate at
    this scale would reach the decision than the gate that sampled the replies.

    Args:
        decisions: Decisions of the replies.
        scores: f of each decision, (N,).
        scale: Scale of the gate whose KL is computed.
        sampled_at: Scale of the gate that sampled the replies; 0 is the base model.

    Source: chain rule of the KL divergence over the decisions, see `objectives.decision_kl`; importance sampling.
    """
    if len(decisions.tokens) == 0:
        return 0.0
    hazards = decisions.hazard_logits.double()
    z, z_sampled = (accept_logit("residual", scores.double(), hazards, s) for s in (scale, sampled_at))
    ratios = torch.where(decisions.accepted, 0.0, logsigmoid(-z) - logsigmoid(-z_sampled))
    places = decisions.replies * (int(decisions.tokens.max()) + 1) + decisions.tokens
    is_first = torch.ones(len(places), dtype=torch.bool)
    is_first[1:] = places[1:] != places[:-1]
    before = ratios.cumsum(0) - ratios
    before = before - before[is_first][is_first.cumsum(0) - 1]  # log of how much more often the decision is reached
    return float((before.exp() * decision_kl(z, hazards)).sum())


def scale_on_decisions(
    decisions: Decisions, scores: Tensor, budget: float, num_tokens: int, sampled_at: float = 0.0
) -> float:
    """Return the largest scale whose KL a token is within the budget; arguments as in `decisions_kl`."""
    return largest_within(lambda scale: decisions_kl(decisions, scores, scale, sampled_at) / num_tokens, budget)


@dataclass(frozen=True, slots=True)
class PositionScores:
    """P positions with all their candidates scored by a head, padded to K candidates.

    Attributes:
        form: Form of the head.
        scores: Scores of the candidates, (P, K).
        hazard_logits: Their hazard logits, (P, K).
        live: Whether an entry is a candidate, not padding, (P, K), bool.
    """

    form: HeadForm
    scores: Tensor
    hazard_logits: Tensor
    live: Tensor

    def kl(self, scale: float) -> Tensor:
        """Return KL(gate || base) of each position at a scale, (P,), in nats."""
        z = accept_logit(self.form, self.scores, self.hazard_logits, scale)
        return kl_to_base(z, self.hazard_logits, self.live)


@torch.inference_mode()
def score_positions(head: AfterstateHead, positions: Sequence[JudgedPosition]) -> PositionScores:
    """Score all candidates of positions; the states of all candidates must be there."""
    widest = max(len(position.hazard_logits) for position in positions)
    scores = torch.zeros(len(positions), widest)
    hazard_logits, live = torch.zeros_like(scores), torch.zeros_like(scores, dtype=torch.bool)
    for row, position in enumerate(positions):
        n = len(position.hazard_logits)
        assert len(position.states) == n, "calibration needs every candidate's state"
        previous = position.previous.expand_as(position.states)
        scores[row, :n] = head.score(position.states, previous).cpu()
        hazard_logits[row, :n] = torch.tensor(position.hazard_logits)
        live[row, :n] = True
    return PositionScores(head.config.form, scores, hazard_logits, live)


def scale_for_budget(positions: PositionScores, budget: float, num_tokens: int) -> float:
    """Return the largest scale whose KL a token is within the budget; `MAX_SCALE` if every scale is.

    Args:
        positions: Positions at which the head is asked.
        budget: KL budget, in nats a token.
        num_tokens: Number of tokens of the replies that the positions are from; tokens without a choice count too.
    """
    return largest_within(lambda scale: float(positions.kl(scale).sum()) / num_tokens, budget)


def largest_within(kl_at: Callable[[float], float], budget: float) -> float:
    """Return the largest scale within the budget, by bisection: the KL grows with the scale."""
    low, high = 0.0, MAX_SCALE
    if kl_at(high) <= budget:
        return high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if kl_at(middle) <= budget else (low, middle)
    return low
