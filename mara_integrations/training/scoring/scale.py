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
from mara_integrations.training import gather
from mara_integrations.training.context import Run
from mara_integrations.training.learning.objectives import decision_kl
from mara_integrations.training.rollouts.decisions import Decisions
from mara_integrations.training.rollouts.replies import sample_replies

MAX_SCALE = 100.0
_REPLIES, _TOKENS = 12, 16


def calibrate(run: Run, head: MARAHead) -> float:
    """Set the head's scale within the KL budget, and return the KL it comes to, in nats a token.

    Found on the base model's own replies, then checked once on the gated model's, which lie further out.
    """
    pool = gather.prompts_of(run, run.plan.train)
    prompts = run.random().sample(pool, min(_REPLIES, len(pool)))
    wide = Decoder(run.backend, Scheduler(max_live=8, feeds_all=True))
    assert isinstance(head, AfterstateHead)
    untrained = MARAHead(head.config).to(run.model.device).eval()
    budget = run.config.kl_budget or run.plan.method.kl_budget
    sampling = run.sampling(
        max_new_tokens=min(_TOKENS, run.config.max_reply_tokens), min_candidates=head.config.min_candidates
    )
    most = run.plan.method.max_scale or MAX_SCALE
    scale, kl = 1.0, 0.0
    with run.stage("scale", 2 * len(prompts)) as advance:
        for gate_head in (untrained, head):
            replies = sample_replies(
                run.model,
                wide,
                prompts,
                sampling=sampling,
                seed=run.config.seed + 7_000_000,
                head=gate_head,
                keep_positions=True,
                on_reply=advance,
            )
            positions = [position for reply in replies for position in reply.positions]
            num_tokens = sum(len(reply.token_ids) for reply in replies)
            if not positions:
                break
            scored = score_positions(head, positions)
            if budget is not None:
                found = min(scale_for_budget(scored, budget, num_tokens), most)
                scale = found if gate_head is untrained else min(scale, found)
            kl = float(scored.kl(scale).sum()) / num_tokens
            head.config = head.config.model_copy(update={"scale": scale})
    report_scale(run, scale, kl, budget)
    return kl


def report_scale(run: Run, scale: float, kl: float, budget: float | None) -> None:
    """Log the scale that was found and the KL it comes to, and say both."""
    if scale >= MAX_SCALE:
        run.say("  [yellow]the head hardly moves any token: its scale met the upper bound[/]")
    run.log("scale", scale=scale, kl_per_token=kl, budget=budget)
    bound = f"budget {budget}" if budget is not None else "no budget"
    run.say(f"  scale {scale:.2f}, KL {kl:.3f} nats a token ({bound})")


def decisions_kl(decisions: Decisions, scores: Tensor, scale: float, written_at: float = 0.0) -> float:
    """KL(gate || base) of residual heads, in nats, summed over all tokens of replies that a gate has drawn.

    Needs only the candidates that were visited: the KL of each decision, weighted by how much more often the gate at
    this scale would come to it than the one that wrote the replies.

    Args:
        decisions: By which the replies were written.
        scores: f of each, (N,).
        scale: Scale of the gate whose KL is computed.
        written_at: Scale of the gate that wrote them; 0 is the base model.

    Source: chain rule of the KL divergence over the decisions, see `objectives.decision_kl`; importance sampling.
    """
    if len(decisions.tokens) == 0:
        return 0.0
    hazards = decisions.hazard_logits.double()
    z, z_written = (accept_logit("residual", scores.double(), hazards, s) for s in (scale, written_at))
    ratios = torch.where(decisions.accepted, 0.0, logsigmoid(-z) - logsigmoid(-z_written))
    places = decisions.replies * (int(decisions.tokens.max()) + 1) + decisions.tokens
    is_first = torch.ones(len(places), dtype=torch.bool)
    is_first[1:] = places[1:] != places[:-1]
    before = ratios.cumsum(0) - ratios
    before = before - before[is_first][is_first.cumsum(0) - 1]  # log of how much more often the gate comes here
    return float((before.exp() * decision_kl(z, hazards)).sum())


def scale_on_decisions(
    decisions: Decisions, scores: Tensor, budget: float, num_tokens: int, written_at: float = 0.0
) -> float:
    """Largest scale whose KL a token stays within the budget; arguments as in `decisions_kl`."""
    return _largest(lambda scale: decisions_kl(decisions, scores, scale, written_at) / num_tokens, budget)


@dataclass(frozen=True, slots=True)
class PositionScores:
    """Positions with all their candidates scored by a head of some form, padded: (P, K) each."""

    form: HeadForm
    scores: Tensor
    hazard_logits: Tensor
    live: Tensor

    def kl(self, scale: float) -> Tensor:
        """KL(gate || base) of each position at a scale, (P,), in nats."""
        z = accept_logit(self.form, self.scores, self.hazard_logits, scale)
        return kl_to_base(z, self.hazard_logits, self.live)


@torch.inference_mode()
def score_positions(head: AfterstateHead, positions: Sequence[JudgedPosition]) -> PositionScores:
    """Score all candidates of positions whose candidates were all fed."""
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
    """Largest scale whose KL a token stays within the budget; `MAX_SCALE` if none leaves it.

    Args:
        positions: Where the gate is asked.
        budget: Nats a token.
        num_tokens: Tokens the positions were taken from; those with a lone candidate cost nothing and count too.
    """
    return _largest(lambda scale: float(positions.kl(scale).sum()) / num_tokens, budget)


def _largest(kl_at: Callable[[float], float], budget: float) -> float:
    """By bisection: KL grows with the scale."""
    low, high = 0.0, MAX_SCALE
    if kl_at(high) <= budget:
        return high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if kl_at(middle) <= budget else (low, middle)
    return low
