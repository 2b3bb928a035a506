"""The methods `dpo` and `kto` on Q-heads: make good replies more probable, and bad ones less, than the base model does.

The gate's distribution over the candidates of every position is known in closed form from the state before it, so that
a reply is read once, as it stands, and competitors need no reading at all. Tokens that are no candidates have no
log-ratio: no gate can take them. They are left out and counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.training.collect.given import given_replies, read_states
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.learning.fit import Loss, fit
from mara_integrations.training.learning.objectives import dpo_loss, kto_loss
from mara_integrations.training.learning.q_objectives import taken_log_ratios
from mara_integrations.training.rollouts.positions import Embeddings, Positions, positions_of_given, q_scores
from mara_integrations.training.scoring.held_out import report_pair_accuracy


@dataclass(frozen=True, slots=True)
class LabelledPositions:
    """Labelled replies as positions; an example is one reply, or `group_size` replies that follow each other.

    Attributes:
        positions: Positions of R replies.
        good: Label of each reply, (R,), bool.
        group_size: Replies of an example: 2 for pairs, the better one first.
        embeddings: Rows of the output embeddings by token ids.
    """

    positions: Positions
    good: Tensor
    group_size: int
    embeddings: Embeddings

    def __len__(self) -> int:
        return len(self.good) // self.group_size

    def take(self, rows: Tensor) -> LabelledPositions:
        """Return the examples at these indices, in that order."""
        replies = (rows[:, None] * self.group_size + torch.arange(self.group_size)).flatten()
        where, counts = self.positions.rows_of(replies)
        numbered = torch.arange(len(replies)).repeat_interleave(counts)
        positions = replace(self.positions.take(where), replies=numbered)
        return LabelledPositions(positions, self.good[replies], self.group_size, self.embeddings)

    def log_ratios(self, head: MARAHead) -> Tensor:
        """Return how much more probable the gate makes each reply than the base model, (R,), in nats."""
        assert isinstance(head, QHead)
        where = self.positions
        scores = q_scores(head, where.states, where.token_ids, self.embeddings)
        ratios = taken_log_ratios(scores, where.log_probs, where.taken, 1.0).cpu()
        return ratios.new_zeros(len(self.good)).index_add(0, where.replies, ratios)


def train_dpo(run: Run, head: MARAHead) -> MethodResult:
    """Fit q to preference pairs."""

    def loss(head: MARAHead, pairs: LabelledPositions) -> Tensor:
        ratios = pairs.log_ratios(head)
        return dpo_loss(ratios[0::2], ratios[1::2], run.config.beta)

    return _train(run, head, 2, loss)


def train_kto(run: Run, head: MARAHead) -> MethodResult:
    """Fit q to labelled replies."""
    _, labels = given_replies(run, run.plan.train)
    good_weight = (len(labels) - sum(labels)) / sum(labels)

    def loss(head: MARAHead, replies: LabelledPositions) -> Tensor:
        return kto_loss(replies.log_ratios(head), replies.good, run.config.beta, good_weight)

    return _train(run, head, 1, loss)


def _train(run: Run, head: MARAHead, group_size: int, loss: Loss[LabelledPositions]) -> MethodResult:
    """Read all replies, fit q by a loss, and report how well it orders held-out replies."""
    sides = []
    for stage, data in (("given replies", run.plan.train), ("held-out given replies", run.plan.held_out)):
        given, labels = given_replies(run, data)
        found = positions_of_given(read_states(run, stage, given), run.backend.logits, run.sampling())
        num_tokens = found.positions.num_tokens
        run.log("tokens", stage=stage, tokens=num_tokens, outside=found.num_outside, lone=found.num_lone)
        run.say(
            f"  {num_tokens} tokens of {stage}: {found.num_outside / num_tokens:.0%} are no candidates of the model, "
            f"{found.num_lone / num_tokens:.0%} the only one; the head learns from the others"
        )
        good = torch.tensor(labels) > 0.5
        sides.append(LabelledPositions(found.positions, good, group_size, run.backend.output_embeddings))
    train, held_out = sides
    settings = run.fit_settings(3e-4)
    positions_per_example = len(train.positions) / len(train)
    settings = replace(settings, batch_size=max(1, round(settings.batch_size / positions_per_example)))
    with run.fitting("fit") as on_epoch:
        history = fit(head, train, held_out, loss, settings, on_epoch)
    if min(epoch.held_out_loss for epoch in history[1:]) >= history[0].held_out_loss:
        run.say(
            "  [yellow]the head orders held-out replies no better than the base model: it learned nothing that holds "
            "for other prompts. More data, more consistent labels, a reward or a rule would help.[/]"
        )
    with torch.inference_mode():
        log_ratios = held_out.log_ratios(head).tolist()
    return MethodResult(report_pair_accuracy(run, [reply.prompt_index for reply in given], log_ratios, labels))
