"""The methods `dpo` and `kto`: make good replies more probable, and bad ones less, than under the base model.

The log-ratio of a residual head to the base model is known exactly from the decisions that generate a reply. So neither
method needs a reference model or a sample: each reply is read once, and then only the head is run. `fit_pairs` and
`fit_labels` serve heads of every form; how replies are read is the form's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from mara_integrations.heads.head import MARAHead
from mara_integrations.training.collect.given import given_replies, read_as_decisions
from mara_integrations.training.collect.workload import Reading, Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.learning.fit import Loss, fit, outputs
from mara_integrations.training.learning.objectives import dpo_loss, kto_loss, reply_log_ratios
from mara_integrations.training.rollouts.decisions import Decisions
from mara_integrations.training.rollouts.replies import GivenReply
from mara_integrations.training.scoring.held_out import report_pair_accuracy


@dataclass(frozen=True, slots=True)
class LabelledReplies(ABC):
    """R labelled replies; an example is one reply, or `group_size` replies that follow each other.

    Attributes:
        good: Label of each reply, (R,), bool.
        group_size: Replies of an example: 2 for pairs, the better one first.
    """

    good: Tensor
    group_size: int

    def __len__(self) -> int:
        return len(self.good) // self.group_size

    def take(self, rows: Tensor) -> Self:
        """Return the examples at these indices, in that order."""
        return self.replies((rows[:, None] * self.group_size + torch.arange(self.group_size)).flatten())

    @abstractmethod
    def replies(self, indices: Tensor) -> Self:
        """Return the replies at these indices, in that order."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Number of states that the head is run on."""

    @abstractmethod
    def log_ratios(self, head: MARAHead) -> Tensor:
        """Return how much more probable the head makes each reply than the base model, (R,), in nats."""


RepliesT = TypeVar("RepliesT", bound=LabelledReplies)
# Reads the replies of a stage; takes the run, the stage, the replies, their labels, and the replies of an example.
Read: TypeAlias = Callable[[Run, str, Sequence[GivenReply], Tensor, int], RepliesT]


def fit_pairs(run: Run, head: MARAHead, read: Read[RepliesT]) -> MethodResult:
    """Fit a head to preference pairs by DPO."""

    def loss(head: MARAHead, pairs: RepliesT) -> Tensor:
        ratios = pairs.log_ratios(head)
        return dpo_loss(ratios[0::2], ratios[1::2], run.config.beta)

    return _fit(run, head, read, 2, loss)


def fit_labels(run: Run, head: MARAHead, read: Read[RepliesT]) -> MethodResult:
    """Fit a head to labelled replies by KTO."""
    _, labels = given_replies(run, run.plan.train)
    good_weight = (len(labels) - sum(labels)) / sum(labels)

    def loss(head: MARAHead, replies: RepliesT) -> Tensor:
        return kto_loss(replies.log_ratios(head), replies.good, run.config.beta, good_weight)

    return _fit(run, head, read, 1, loss)


def _fit(run: Run, head: MARAHead, read: Read[RepliesT], group_size: int, loss: Loss[RepliesT]) -> MethodResult:
    """Read all replies, fit a head by a loss, and report how well it orders held-out replies."""
    sides = []
    for stage, data in (("given replies", run.plan.train), ("held-out given replies", run.plan.held_out)):
        given, labels = given_replies(run, data)
        sides.append(read(run, stage, given, torch.tensor(labels) > 0.5, group_size))
    train, held_out = sides
    settings = run.fit_settings(3e-4)
    rows_per_example = train.num_rows / len(train)
    settings = replace(settings, batch_size=max(1, round(settings.batch_size / rows_per_example)))
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


@dataclass(frozen=True, slots=True)
class LabelledDecisions(LabelledReplies):
    """Labelled replies as decisions.

    Attributes:
        decisions: Decisions of the R replies.
    """

    decisions: Decisions

    @property
    @override
    def num_rows(self) -> int:
        return len(self.decisions.states)

    @override
    def replies(self, indices: Tensor) -> LabelledDecisions:
        return LabelledDecisions(self.good[indices], self.group_size, self.decisions.take(indices))

    @override
    def log_ratios(self, head: MARAHead) -> Tensor:
        d = self.decisions
        return reply_log_ratios(outputs(head, d.states), d.hazard_logits, d.accepted, d.replies, len(d))


def train_dpo(run: Run, head: MARAHead) -> MethodResult:
    """Fit f to preference pairs."""
    return fit_pairs(run, head, _read)


def train_kto(run: Run, head: MARAHead) -> MethodResult:
    """Fit f to labelled replies."""
    return fit_labels(run, head, _read)


def work(run: Run) -> Workload:
    """Return what `train_dpo` or `train_kto` will do."""
    readings = Reading.of_both_sides(run, is_by_token=True)
    return Workload(readings=readings, fitted=sum(map(len, readings)))


def _read(run: Run, stage: str, given: Sequence[GivenReply], good: Tensor, group_size: int) -> LabelledDecisions:
    """Read replies as the decisions that would generate them."""
    return LabelledDecisions(good, group_size, read_as_decisions(run, stage, given, run.config.competitors))
