"""The methods `dpo` and `kto` on Q-heads: make good replies more probable, and bad ones less, than the base model does.

The gate's distribution over the candidates of every position is known in closed form from the state before it, so that
a reply is read once, as it stands, and competitors need no reading at all. Tokens that are not candidates have no
log-ratio: no gate can take them. They are left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.training.collect.given import read_states
from mara_integrations.training.collect.workload import Reading, Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.learning.q_objectives import taken_log_ratios
from mara_integrations.training.methods.preference import LabelledReplies, fit_labels, fit_pairs
from mara_integrations.training.rollouts.positions import Embeddings, Positions, positions_of_given, q_scores
from mara_integrations.training.rollouts.replies import GivenReply


@dataclass(frozen=True, slots=True)
class LabelledPositions(LabelledReplies):
    """Labelled replies as positions.

    Attributes:
        positions: Positions of the R replies.
        embeddings: Rows of the output embeddings by token ids.
    """

    positions: Positions
    embeddings: Embeddings

    @property
    @override
    def num_rows(self) -> int:
        return len(self.positions)

    @override
    def replies(self, indices: Tensor) -> LabelledPositions:
        where, counts = self.positions.rows_of(indices)
        numbered = torch.arange(len(indices)).repeat_interleave(counts)
        positions = replace(self.positions.take(where), replies=numbered)
        return LabelledPositions(self.good[indices], self.group_size, positions, self.embeddings)

    @override
    def log_ratios(self, head: MARAHead) -> Tensor:
        assert isinstance(head, QHead)
        where = self.positions
        scores = q_scores(head, where.states, where.token_ids, self.embeddings)
        ratios = taken_log_ratios(scores, where.log_probs, where.taken, 1.0).cpu()
        return ratios.new_zeros(len(self.good)).index_add(0, where.replies, ratios)


def train_dpo(run: Run, head: MARAHead) -> MethodResult:
    """Fit q to preference pairs."""
    return fit_pairs(run, head, _read)


def train_kto(run: Run, head: MARAHead) -> MethodResult:
    """Fit q to labelled replies."""
    return fit_labels(run, head, _read)


def work(run: Run) -> Workload:
    """Return what `train_dpo` or `train_kto` will do."""
    readings = Reading.of_both_sides(run)
    return Workload(readings=readings, fitted=sum(map(len, readings)))


def _read(run: Run, stage: str, given: Sequence[GivenReply], good: Tensor, group_size: int) -> LabelledPositions:
    """Read replies as they stand, and say how many of their tokens no gate can change."""
    found = positions_of_given(read_states(run, stage, given), run.backend.logits, run.sampling())
    num_tokens = found.positions.num_tokens
    run.log("tokens", stage=stage, tokens=num_tokens, outside=len(found.outside), lone=found.num_lone)
    run.say(
        f"  {num_tokens} tokens of {stage}: {len(found.outside) / num_tokens:.0%} are not candidates of the model, "
        f"{found.num_lone / num_tokens:.0%} the only one; the head learns from the others"
    )
    return LabelledPositions(good, group_size, found.positions, run.backend.output_embeddings)
