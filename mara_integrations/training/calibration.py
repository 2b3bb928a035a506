"""How strong a head may be: the largest strength that keeps the gated model within a KL budget of the base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mara_integrations.engine.gate import accept_logit, kl_to_base
from mara_integrations.engine.head import MARAHead
from mara_integrations.engine.sequence import JudgedPosition

MAX_STRENGTH = 100.0


@dataclass(frozen=True, slots=True)
class PositionScores:
    """Positions with all their candidates scored by a head, padded: (P, K) each."""

    scores: Tensor
    hazard_logits: Tensor
    live: Tensor

    def kl(self, strength: float) -> Tensor:
        """KL(gate || base) of each position at a strength, (P,), in nats."""
        z = accept_logit("residual", self.scores, self.hazard_logits, strength)
        return kl_to_base(z, self.hazard_logits, self.live)


@torch.inference_mode()
def score_positions(head: MARAHead, positions: Sequence[JudgedPosition]) -> PositionScores:
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
    return PositionScores(scores, hazard_logits, live)


def strength_for_budget(positions: PositionScores, budget: float, num_tokens: int) -> float:
    """Largest strength whose KL a token stays within the budget; `MAX_STRENGTH` if none leaves it.

    Args:
        positions: Where the gate is asked.
        budget: Nats a token.
        num_tokens: Tokens the positions were taken from; those with a lone candidate cost nothing and count too.
    """
    low, high = 0.0, MAX_STRENGTH
    if float(positions.kl(high).sum()) / num_tokens <= budget:
        return high
    for _ in range(30):
        middle = (low + high) / 2
        if float(positions.kl(middle).sum()) / num_tokens <= budget:
            low = middle
        else:
            high = middle
    return low
