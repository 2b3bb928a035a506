"""The `rule` method: label every token that completes a violation, and push f down there and only there.

In a correction round the gated model generates replies, the violations that got through and the candidates that were
rejected for no reason are labelled, and the head is fitted again (DAgger). The text decides what violates the rule, so
labels are exact; the head only has to recognise the states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mara_integrations.errors import DataError
from mara_integrations.heads.head import MARAHead
from mara_integrations.models.load import LoadedModel
from mara_integrations.rewards import Rule
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.given import given_replies, read_states
from mara_integrations.training.collect.prompts import limited_prompts, replies_per_prompt
from mara_integrations.training.collect.workload import Generation, Reading, Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.learning.fit import Epoch, FitSettings, Table, fit, outputs
from mara_integrations.training.learning.objectives import rule_loss
from mara_integrations.training.records.memory_mapped import joined
from mara_integrations.training.rollouts.replies import Reply, token_texts

_HELD_OUT_SEED, _ROUND_SEED = 500_000, 1_000_000  # offsets larger than any number of replies


def train(run: Run, head: MARAHead) -> MethodResult:
    """Fit f to base replies and those of the data, then to what the gated model still gets wrong."""
    rule, seed = run.plan.rule, run.config.seed
    assert rule is not None
    prompts = limited_prompts(run, run.plan.train)
    held_out_prompts = limited_prompts(run, run.plan.held_out)
    per_prompt = min(2, replies_per_prompt(run))
    replies = generate_replies(run, "base replies", prompts, per_prompt, seed)
    held_out = generate_replies(run, "held-out base replies", held_out_prompts, per_prompt, seed + _HELD_OUT_SEED)
    for data, stage, side in (
        (run.plan.train, "given replies", replies),
        (run.plan.held_out, "held-out given replies", held_out),
    ):
        given, _ = given_replies(run, data)
        if given:
            side += read_states(run, stage, given)
    check_violations(run, rule, replies)
    for number in range(run.config.correction_rounds + 1):
        tables = (rule_table(run.model, replies, rule), rule_table(run.model, held_out, rule))
        with run.fitting(f"fit {number + 1}") as on_epoch:
            fit_rule(head, *tables, settings=run.fit_settings(1e-3), on_epoch=on_epoch)
        if number < run.config.correction_rounds:
            stage, round_seed = f"gated replies {number + 1}", seed + _ROUND_SEED * (number + 1)
            gated = generate_replies(run, stage, prompts, 1, round_seed, head)
            num_violating = count_violating(rule, gated)
            run.log("correction", round=number + 1, replies=len(gated), violations=num_violating)
            run.say(f"  correction round {number + 1}: {num_violating} of {len(gated)} gated replies break the rule")
            replies += gated
            held_out += generate_replies(
                run, f"held-out {stage}", held_out_prompts, 1, round_seed + _HELD_OUT_SEED, head
            )
    return MethodResult()


def work(run: Run) -> Workload:
    """Return what `train` will do."""
    per_prompt, rounds = min(2, replies_per_prompt(run)), run.config.correction_rounds
    prompts = [limited_prompts(run, data) for data in (run.plan.train, run.plan.held_out)]
    seeds = (run.config.seed, run.config.seed + _HELD_OUT_SEED)
    base = [Generation(side, per_prompt, seed) for side, seed in zip(prompts, seeds, strict=True)]
    gated = [Generation(side, is_gated=True) for side in prompts] * rounds
    readings = Reading.of_both_sides(run)
    known = sum(map(len, base)) + sum(map(len, readings))
    fitted = sum(known + number * sum(map(len, prompts)) for number in range(rounds + 1))
    return Workload([*base, *gated], readings, fitted)


def check_violations(run: Run, rule: Rule, replies: Sequence[Reply]) -> None:
    """Say how many replies break the rule, and refuse to learn from none.

    Raises:
        DataError: If there is none.
    """
    num_violating = count_violating(rule, replies)
    run.say(f"  {num_violating} of {len(replies)} replies break the rule")
    if not num_violating:
        assert run.plan.rule is not None
        raise DataError(
            f"none of {len(replies)} replies has what is forbidden ({run.plan.rule.described})",
            hint="use prompts that provoke it, or data with replies that have it",
        )


def count_violating(rule: Rule, replies: Sequence[Reply]) -> int:
    """Return the number of replies that break the rule."""
    return sum(bool(rule.violations(reply.text)) for reply in replies)


def offending_tokens(texts: Sequence[str], rule: Rule) -> list[bool]:
    """Return for each token whether it completes a violation, from the text after each token."""
    offends, before = [], 0
    for text in texts:
        ends = [end for _, end in rule.violations(text)]
        offends.append(any(end > before for end in ends))
        before = max([before, *ends])
    return offends


def rule_table(model: LoadedModel, replies: Sequence[Reply], rule: Rule) -> Table:
    """Return one example a token, and one a candidate that was visited and not taken; target 1 where it offends."""
    states: list[Tensor] = []
    offends: list[bool] = []
    for reply in replies:
        texts = token_texts(model, reply.token_ids)
        states.append(reply.states[1:])
        offends += offending_tokens(texts, rule)
        for position in reply.positions:
            before = texts[position.index - 1] if position.index else ""
            num_before = len(rule.violations(before))
            for candidate, state in zip(position.token_ids, position.states, strict=False):  # the first ones were fed
                if candidate == reply.token_ids[position.index]:
                    continue
                text = token_texts(model, [*reply.token_ids[: position.index], candidate], last=1)[0]
                states.append(state.half().cpu()[None])
                offends.append(len(rule.violations(text)) > num_before)
    return Table(joined(states), torch.tensor(offends, dtype=torch.float32), torch.ones(len(offends)))


def fit_rule(
    head: MARAHead, train: Table, held_out: Table, *, settings: FitSettings, on_epoch: Callable[[Epoch], None]
) -> list[Epoch]:
    """Fit f to tables of `rule_table`, starting from the head as it is.

    Rare offending examples are repeated until they are a tenth of all, so that every minibatch holds some.
    """
    offending = (train.targets > 0).nonzero()[:, 0]
    if 0 < len(offending) < len(train) // 10:
        repeated = offending.repeat(len(train) // 10 // len(offending))
        train = train.take(torch.cat([torch.arange(len(train)), repeated]))

    def loss(head: MARAHead, table: Table) -> Tensor:
        return rule_loss(outputs(head, table.states), table.targets > 0)

    return fit(head, train, held_out, loss, settings, on_epoch)
