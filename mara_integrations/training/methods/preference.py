"""The methods `dpo` and `kto`: make good replies more probable, and bad ones less, than under the base model.

The log-ratio of a residual head to the base model is known exactly from the decisions that generate a reply. So neither
method needs a reference model or a sample: each reply is read once, and then only the head is run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mara_integrations.heads.head import MARAHead
from mara_integrations.training.collect.given import given_replies, read_as_decisions
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.learning.fit import Loss, fit, outputs
from mara_integrations.training.learning.objectives import dpo_loss, kto_loss, reply_log_ratios
from mara_integrations.training.rollouts.decisions import Decisions
from mara_integrations.training.scoring.held_out import report_pair_accuracy


@dataclass(frozen=True, slots=True)
class LabelledDecisions:
    """Labelled replies as decisions; an example is one reply, or `group_size` replies that follow each other.

    Attributes:
        decisions: Decisions of R replies.
        good: Label of each reply, (R,), bool.
        group_size: Replies of an example: 2 for pairs, the better one first.
    """

    decisions: Decisions
    good: Tensor
    group_size: int

    def __len__(self) -> int:
        return len(self.good) // self.group_size

    def take(self, rows: Tensor) -> LabelledDecisions:
        """Return the examples at these indices, in that order."""
        replies = (rows[:, None] * self.group_size + torch.arange(self.group_size)).flatten()
        return LabelledDecisions(self.decisions.take(replies), self.good[replies], self.group_size)

    def log_ratios(self, head: MARAHead) -> Tensor:
        """Return how much more probable the head makes each reply, (R,), in nats."""
        d = self.decisions
        scores = outputs(head, d.states)
        return reply_log_ratios(scores, d.hazard_logits, d.accepted, d.replies, len(d))


def train_dpo(run: Run, head: MARAHead) -> MethodResult:
    """Fit f to preference pairs."""
    beta = run.config.beta

    def loss(head: MARAHead, pairs: LabelledDecisions) -> Tensor:
        ratios = pairs.log_ratios(head)
        return dpo_loss(ratios[0::2], ratios[1::2], beta)

    return _train(run, head, 2, loss)


def train_kto(run: Run, head: MARAHead) -> MethodResult:
    """Fit f to labelled replies."""
    _, labels = given_replies(run, run.plan.train)
    good_weight = (len(labels) - sum(labels)) / sum(labels)

    def loss(head: MARAHead, replies: LabelledDecisions) -> Tensor:
        return kto_loss(replies.log_ratios(head), replies.good, run.config.beta, good_weight)

    return _train(run, head, 1, loss)


def _train(run: Run, head: MARAHead, group_size: int, loss: Loss[LabelledDecisions]) -> MethodResult:
    """Read all replies, fit f by a loss, and report how well it orders held-out replies."""
    sides = []
    for stage, data in (("given replies", run.plan.train), ("held-out given replies", run.plan.held_out)):
        given, labels = given_replies(run, data)
        decisions = read_as_decisions(run, stage, given, run.config.competitors)
        sides.append(LabelledDecisions(decisions, torch.tensor(labels) > 0.5, group_size))
    train, held_out = sides
    settings = run.fit_settings(3e-4)
    decisions_per_example = len(train.decisions.states) / len(train)
    settings = replace(settings, batch_size=max(1, round(settings.batch_size / decisions_per_example)))
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
