"""Regression of q on a target for each candidate of each position, which most methods on Q-heads share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.training.context import Run
from mara_integrations.training.learning.fit import Epoch, Targets, fit
from mara_integrations.training.learning.objectives import MAX_ADVANTAGE
from mara_integrations.training.learning.q_objectives import score_loss
from mara_integrations.training.rollouts.positions import Positions, q_scores

POSITIONS_PER_STEP = 1024


def standardised(positions: Sequence[Positions], values: Sequence[Tensor]) -> list[Targets]:
    """Return targets for each side in standard deviations of the first, cut off at `MAX_ADVANTAGE` of them.

    Args:
        positions: Positions of each side.
        values: Values of their candidates, (P, K) a side.
    """
    spread = float(values[0][positions[0].live].std()) or 1.0
    return [
        Targets(where, (value / spread).clamp(-MAX_ADVANTAGE, MAX_ADVANTAGE))
        for where, value in zip(positions, values, strict=True)
    ]


def regress(run: Run, name: str, head: QHead, train: Targets, held_out: Targets) -> list[Epoch]:
    """Fit q of each candidate to its target, and show the progress; return all epochs."""
    with run.fitting(name) as on_epoch:
        return fit_targets(run, head, train, held_out, on_epoch)


def fit_targets(
    run: Run, head: QHead, train: Targets, held_out: Targets, on_epoch: Callable[[Epoch], None], **changes: int
) -> list[Epoch]:
    """Fit q of each candidate to its target, and report no progress but by `on_epoch`; return all epochs.

    `changes` are of the settings of the fit.
    """
    embeddings = run.backend.output_embeddings

    def loss(head: MARAHead, part: Targets) -> Tensor:
        assert isinstance(head, QHead)
        where = part.positions
        return score_loss(q_scores(head, where.states, where.token_ids, embeddings), part.values, where.log_probs)

    settings = replace(run.fit_settings(1e-3), batch_size=POSITIONS_PER_STEP, **changes)
    return fit(head, train, held_out, loss, settings, on_epoch)
