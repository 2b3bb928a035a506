"""Regression of q on a target for each candidate of each position, which most methods on Q-heads share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.training.context import Run
from mara_integrations.training.learning.fit import Epoch, Targets, fit
from mara_integrations.training.learning.q_objectives import score_loss
from mara_integrations.training.rollouts.positions import q_scores

_POSITIONS_PER_STEP = 1024


def regress(run: Run, name: str, head: QHead, train: Targets, held_out: Targets) -> None:
    """Fit q of each candidate to its target, and show the progress."""
    with run.fitting(name) as on_epoch:
        fit_targets(run, head, train, held_out, on_epoch)


def fit_targets(
    run: Run, head: QHead, train: Targets, held_out: Targets, on_epoch: Callable[[Epoch], None], **changes: int
) -> None:
    """Fit q of each candidate to its target, and report no progress but by `on_epoch`; `changes` are of the fit."""
    embeddings = run.backend.output_embeddings

    def loss(head: MARAHead, part: Targets) -> Tensor:
        assert isinstance(head, QHead)
        where = part.positions
        return score_loss(q_scores(head, where.states, where.token_ids, embeddings), part.values, where.log_probs)

    settings = replace(run.fit_settings(1e-3), batch_size=_POSITIONS_PER_STEP, **changes)
    fit(head, train, held_out, loss, settings, on_epoch)
