"""Fits the gate to a wanted distribution over the candidates of each position. `rule` and `grounding` share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.training.context import Run
from mara_integrations.training.learning.fit import Epoch, Rows, fit
from mara_integrations.training.learning.q_objectives import divergence_loss
from mara_integrations.training.rollouts.positions import Positions, join_columns, q_scores


@dataclass(frozen=True, slots=True)
class Wanted(Rows):
    """Positions, and the distribution that the gate should have at each.

    Attributes:
        positions: P positions.
        log_probs: Log-probabilities that the gate should give the candidates, (P, K).
    """

    positions: Positions
    log_probs: Tensor

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All positions of the parts, in order."""
        positions = Positions.join([part.positions for part in parts])
        return cls(positions, join_columns([part.log_probs for part in parts], missing=-torch.inf))


def fit_wanted(run: Run, name: str, head: QHead, train: Wanted, held_out: Wanted, **changes: int) -> list[Epoch]:
    """Fit the gate, starting from the head as it is, and show the progress; return all epochs.

    `changes` are of the settings of the fit.
    """
    embeddings = run.backend.output_embeddings

    def loss(head: MARAHead, part: Wanted) -> Tensor:
        assert isinstance(head, QHead)
        where = part.positions
        scores = q_scores(head, where.states, where.token_ids, embeddings)
        return divergence_loss(scores, where.log_probs, part.log_probs)

    with run.fitting(name) as on_epoch:
        return fit(head, train, held_out, loss, replace(run.fit_settings(1e-3), **changes), on_epoch)
