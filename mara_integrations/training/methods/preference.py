"""The `dpo` and `kto` methods: make good replies more, and bad ones less probable under the gate than under the model.

A residual head's log-ratio to the base model is known exactly from the decisions that write a reply, so that neither
needs a reference model or a sample: one reading of each reply, then only the head is run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mara_integrations.heads.head import MARAHead
from mara_integrations.training import gather
from mara_integrations.training.context import Learned, Run
from mara_integrations.training.learning.fit import Loss, fit, outputs
from mara_integrations.training.learning.objectives import dpo_loss, kto_loss, reply_log_ratios
from mara_integrations.training.rollouts.decisions import Decisions
from mara_integrations.training.scoring.pair_accuracy import held_out_ordering


@dataclass(frozen=True, slots=True)
class JudgedReplies:
    """Replies as decisions, with their labels; an example is a reply, or `group` of them that follow each other.

    Attributes:
        decisions: Of R replies.
        good: Label of each, (R,), bool.
        group: Replies an example has: 2 for pairs, the better one first.
    """

    decisions: Decisions
    good: Tensor
    group: int

    def __len__(self) -> int:
        return len(self.good) // self.group

    def take(self, rows: Tensor) -> JudgedReplies:
        """The named examples."""
        replies = (rows[:, None] * self.group + torch.arange(self.group)).flatten()
        return JudgedReplies(self.decisions.take(replies), self.good[replies], self.group)

    def log_ratios(self, head: MARAHead) -> Tensor:
        """How much more probable the head makes each reply, (R,), in nats."""
        d = self.decisions
        scores = outputs(head, d.states)
        return reply_log_ratios(scores, d.hazard_logits, d.accepted, d.replies, len(d))


def learn_dpo(run: Run, head: MARAHead) -> Learned:
    """Fit f to preference pairs, and see how it orders held-out ones."""
    beta = run.config.beta

    def loss(head: MARAHead, pairs: JudgedReplies) -> Tensor:
        ratios = pairs.log_ratios(head)
        return dpo_loss(ratios[0::2], ratios[1::2], beta)

    return _learn(run, head, 2, loss)


def learn_kto(run: Run, head: MARAHead) -> Learned:
    """Fit f to labelled replies, and see how it orders held-out ones."""
    _, labels = gather.written_replies(run, run.plan.train)
    good_weight = (len(labels) - sum(labels)) / sum(labels)

    def loss(head: MARAHead, replies: JudgedReplies) -> Tensor:
        return kto_loss(replies.log_ratios(head), replies.good, run.config.beta, good_weight)

    return _learn(run, head, 1, loss)


def _learn(run: Run, head: MARAHead, group: int, loss: Loss[JudgedReplies]) -> Learned:
    parts = []
    for name, data in (("given replies", run.plan.train), ("held-out given replies", run.plan.held_out)):
        texts, labels = gather.written_replies(run, data)
        decisions = gather.read_as_decisions(run, name, texts, run.config.competitors)
        parts.append(JudgedReplies(decisions, torch.tensor(labels) > 0.5, group))
    fitting, checking = parts
    settings = run.fit_settings(3e-4)
    decided = len(fitting.decisions.states) / len(fitting)
    settings = replace(settings, batch_size=max(1, round(settings.batch_size / decided)))  # given in tokens
    with run.fitting("fit") as on_epoch:
        history = fit(head, fitting, checking, loss, settings, on_epoch)
    if min(epoch.held_out_loss for epoch in history[1:]) >= history[0].held_out_loss:
        run.say(
            "  [yellow]the head orders held-out replies no better than the base model: nothing was learnt that holds "
            "for other prompts. More or more consistent preferences, a reward or a rule would teach it more.[/]"
        )
    with torch.inference_mode():
        values = checking.log_ratios(head).tolist()
    prompts = [prompt for prompt, _, _ in texts]
    return Learned(held_out_ordering(run, prompts, values, labels))
