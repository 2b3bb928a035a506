"""The `value` method: regress labels or rewards of replies on the hidden states along them.

V(s) estimates the label or reward of a reply from any of its tokens on, so V(candidate) - V(last token) is what taking
the candidate is expected to change. It needs only the states of tokens in the replies: no pairs, no other candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mara_integrations.errors import DataError
from mara_integrations.evaluation.metrics import Interval
from mara_integrations.heads.head import MARAHead
from mara_integrations.training.collect.given import given_replies, read_states
from mara_integrations.training.collect.prompts import limited_prompts, replies_per_prompt
from mara_integrations.training.collect.rewards import rewarded_replies
from mara_integrations.training.collect.workload import Generation, Reading, Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.learning.fit import Epoch, FitSettings, Table, fit, outputs
from mara_integrations.training.learning.objectives import value_loss
from mara_integrations.training.records.memory_mapped import joined
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.scoring.held_out import report_pair_accuracy

_HELD_OUT_SEED = 500_000  # apart from the seeds of replies to fit on


def train(run: Run, head: MARAHead) -> MethodResult:
    """Fit V to labels or rewards, and report how well it orders held-out replies."""
    return MethodResult(fit_and_report(run, head))


def work(run: Run) -> Workload:
    """Return what `train` will do."""
    if run.plan.source != "reward":
        readings = Reading.of_both_sides(run)
        return Workload(readings=readings, fitted=sum(map(len, readings)))
    each, seed = replies_per_prompt(run), run.config.seed
    sides = ((run.plan.train, seed), (run.plan.held_out, seed + _HELD_OUT_SEED))
    generations = [Generation(limited_prompts(run, data), each, first) for data, first in sides]
    return Workload(generations, fitted=sum(map(len, generations)))


def fit_and_report(run: Run, head: MARAHead) -> Interval | None:
    """Fit V in place; return the share of held-out pairs that it orders correctly, see `report_pair_accuracy`."""
    plan, is_binary = run.plan, run.plan.source != "reward"
    if is_binary:
        given, targets = given_replies(run, plan.train)
        replies = read_states(run, "given replies", given)
        given, held_out_targets = given_replies(run, plan.held_out)
        held_out = read_states(run, "held-out given replies", given)
    else:
        seed = run.config.seed
        replies, rewards = rewarded_replies(run, "base replies", plan.train, seed)
        held_out, held_out_rewards = rewarded_replies(
            run, "held-out base replies", plan.held_out, seed + _HELD_OUT_SEED
        )
        targets, held_out_targets = advantages(replies, rewards), advantages(held_out, held_out_rewards)
        if not any(targets):
            raise DataError(
                f"the reward gave all replies to a prompt the same, as {rewards[0]}: nothing to learn from",
                hint="check the reward function",
            )
    with run.fitting("fit") as on_epoch:
        history = fit_value(
            head,
            (replies, targets),
            (held_out, held_out_targets),
            is_binary=is_binary,
            settings=run.fit_settings(3e-4),
            on_epoch=on_epoch,
        )
    if min(epoch.held_out_loss for epoch in history[1:]) >= history[0].held_out_loss:
        run.say(
            "  [yellow]on held-out replies the head predicts no better than a constant: it learned nothing that holds "
            "for other prompts. More data, more consistent labels, a reward or a rule would help.[/]"
        )
    prompts = [reply.prompt_index for reply in held_out]
    return report_pair_accuracy(run, prompts, reply_values(head, held_out), held_out_targets)


def value_table(replies: Sequence[Reply], targets: Sequence[float]) -> Table:
    """Return one example a state, the prompt's last token included; replies of any length have the same weight."""
    lengths = [len(reply.states) for reply in replies]
    repeats = torch.tensor(lengths)
    return Table(
        joined([reply.states for reply in replies]),
        torch.tensor(targets, dtype=torch.float32).repeat_interleave(repeats),
        (1.0 / repeats.float()).repeat_interleave(repeats),
    )


def advantages(replies: Sequence[Reply], rewards: Sequence[float]) -> list[float]:
    """Return each reward less the mean of the same prompt's other replies, in standard deviations of the differences.

    The value of a prompt cancels in V(candidate) - V(last token), so the head need not learn it. The reward of a lone
    reply to a prompt is compared with the mean of all replies.
    """
    by_prompt: dict[int, list[float]] = {}
    for reply, reward in zip(replies, rewards, strict=True):
        by_prompt.setdefault(reply.prompt_index, []).append(reward)
    overall = float(np.mean(rewards))
    centred = []
    for reply, reward in zip(replies, rewards, strict=True):
        group = by_prompt[reply.prompt_index]
        others = (sum(group) - reward) / (len(group) - 1) if len(group) > 1 else overall
        centred.append(reward - others)
    deviation = float(np.std(centred))
    return [value / deviation if deviation > 0 else 0.0 for value in centred]


def fit_value(
    head: MARAHead,
    train: tuple[Sequence[Reply], Sequence[float]],
    held_out: tuple[Sequence[Reply], Sequence[float]],
    *,
    is_binary: bool,
    settings: FitSettings,
    on_epoch: Callable[[Epoch], None],
) -> list[Epoch]:
    """Fit V to replies and their targets: labels 0 and 1 if binary, else `advantages`."""

    def loss(head: MARAHead, table: Table) -> Tensor:
        return value_loss(outputs(head, table.states), table.targets, table.weights, is_binary=is_binary)

    return fit(head, value_table(*train), value_table(*held_out), loss, settings, on_epoch)


@torch.inference_mode()
def reply_values(head: MARAHead, replies: Sequence[Reply]) -> list[float]:
    """Return the mean of V along each reply."""
    return [float(outputs(head, reply.states[1:]).mean()) if len(reply.states) > 1 else 0.0 for reply in replies]
