"""The `value` method: regress what a reply was worth on the states along it; the gate steps up that value.

V(s) estimates the worth of a reply from any of its tokens on, so V(candidate) - V(last token) is what taking the
candidate is expected to change. It needs only states of tokens that were really written: no pairs, no candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mara_integrations.errors import DataError
from mara_integrations.heads.head import MARAHead
from mara_integrations.training import gather
from mara_integrations.training.context import Learned, Run
from mara_integrations.training.learning.fit import Epoch, FitSettings, Table, fit, outputs
from mara_integrations.training.learning.objectives import value_loss
from mara_integrations.training.records.memory_mapped import joined
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.scoring.pair_accuracy import held_out_ordering


def learn(run: Run, head: MARAHead) -> Learned:
    """Fit V to labels or rewards, and see how well it orders held-out replies of different worth."""
    plan, is_binary = run.plan, run.plan.source != "reward"
    if is_binary:
        texts, targets = gather.written_replies(run, plan.train)
        fitting = gather.read(run, "given replies", texts)
        texts, held_out_targets = gather.written_replies(run, plan.held_out)
        checking = gather.read(run, "held-out given replies", texts)
    else:
        fitting, worth = gather.rewarded(run, "base replies", plan.train, run.config.seed)
        checking, held_out_worth = gather.rewarded(
            run, "held-out base replies", plan.held_out, run.config.seed + 500_000
        )
        targets, held_out_targets = advantages(fitting, worth), advantages(checking, held_out_worth)
        if not any(targets):
            message = f"the reward gave every reply {worth[0]}: nothing to learn from"
            raise DataError(message, hint="check the reward function")
    with run.fitting("fit") as on_epoch:
        history = fit_value(
            head,
            (fitting, targets),
            (checking, held_out_targets),
            is_binary=is_binary,
            settings=run.fit_settings(3e-4),
            on_epoch=on_epoch,
        )
    if min(epoch.held_out_loss for epoch in history[1:]) >= history[0].held_out_loss:
        run.say(
            "  [yellow]V is no better than a constant on held-out replies: nothing was learnt that holds for other "
            "prompts. More or more consistent preferences, a reward or a rule would teach it more.[/]"
        )
    return Learned(held_out_ordering(run, [r.prompt for r in checking], reply_values(head, checking), held_out_targets))


def value_table(replies: Sequence[Reply], targets: Sequence[float]) -> Table:
    """One row a state, the prompt's last token included; replies of any length count alike."""
    lengths = [len(reply.states) for reply in replies]
    repeats = torch.tensor(lengths)
    return Table(
        joined([reply.states for reply in replies]),
        torch.tensor(targets, dtype=torch.float32).repeat_interleave(repeats),
        (1.0 / repeats.float()).repeat_interleave(repeats),
    )


def advantages(replies: Sequence[Reply], rewards: Sequence[float]) -> list[float]:
    """Rewards as targets: less the mean of the same prompt's other replies, in standard deviations of what remains.

    The value of a prompt cancels in V(candidate) - V(last token), so the head need not learn it; where prompts have one
    reply each, the mean of all stands for it.
    """
    by_prompt: dict[int, list[float]] = {}
    for reply, reward in zip(replies, rewards, strict=True):
        by_prompt.setdefault(reply.prompt, []).append(reward)
    overall = float(np.mean(rewards))
    centred = []
    for reply, reward in zip(replies, rewards, strict=True):
        group = by_prompt[reply.prompt]
        others = (sum(group) - reward) / (len(group) - 1) if len(group) > 1 else overall
        centred.append(reward - others)
    scale = float(np.std(centred))
    return [value / scale if scale > 0 else 0.0 for value in centred]


def fit_value(
    head: MARAHead,
    train: tuple[Sequence[Reply], Sequence[float]],
    held_out: tuple[Sequence[Reply], Sequence[float]],
    *,
    is_binary: bool,
    settings: FitSettings,
    on_epoch: Callable[[Epoch], None],
) -> list[Epoch]:
    """Fit V to replies and what they were worth: 0 or 1 if binary, else `advantages`."""

    def loss(head: MARAHead, table: Table) -> Tensor:
        return value_loss(outputs(head, table.states), table.targets, table.weights, is_binary=is_binary)

    return fit(head, value_table(*train), value_table(*held_out), loss, settings, on_epoch)


@torch.inference_mode()
def reply_values(head: MARAHead, replies: Sequence[Reply]) -> list[float]:
    """Mean V along each reply, as a score of the whole."""
    return [float(outputs(head, reply.states[1:]).mean()) if len(reply.states) > 1 else 0.0 for reply in replies]
