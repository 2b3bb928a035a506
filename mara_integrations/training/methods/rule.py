"""The `rule` method: every token that completes a violation is labelled, and f is pushed down there and only there.

A correction round lets the gated model write, labels what got through and what was refused for no reason, and fits
again (DAgger). The text decides what offends, so the labels are exact; the head only has to recognise the states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mara_integrations.errors import DataError
from mara_integrations.heads.head import MARAHead
from mara_integrations.models.load import LoadedModel
from mara_integrations.rewards import Rule
from mara_integrations.training import gather
from mara_integrations.training.context import Learned, Run
from mara_integrations.training.learning.fit import Epoch, FitSettings, Table, fit, outputs
from mara_integrations.training.learning.objectives import rule_loss
from mara_integrations.training.records.memory_mapped import joined
from mara_integrations.training.rollouts.replies import Reply, token_texts

_HELD_OUT, _ROUND = 500_000, 1_000_000  # apart by more than there are replies: what seeds are counted from


def learn(run: Run, head: MARAHead) -> Learned:
    """Fit on base replies and on those of the data, then correct what the gated model still writes."""
    rule, seed = run.plan.rule, run.config.seed
    assert rule is not None
    train = gather.limited_prompts(run, run.plan.train)
    held_out = gather.limited_prompts(run, run.plan.held_out)
    each = min(2, gather.replies_each(run))
    fitting = gather.sample(run, "base replies", train, each, seed)
    checking = gather.sample(run, "held-out base replies", held_out, each, seed + _HELD_OUT)
    for part, name, bank in (
        (run.plan.train, "given replies", fitting),
        (run.plan.held_out, "held-out given replies", checking),
    ):
        texts, _ = gather.written_replies(run, part)
        if texts:
            bank += gather.read(run, name, texts)
    _check_taught(run, rule, fitting)
    for number in range(run.config.correction_rounds + 1):
        tables = (rule_table(run.model, fitting, rule), rule_table(run.model, checking, rule))
        with run.fitting(f"fit {number + 1}") as on_epoch:
            fit_rule(head, *tables, settings=run.fit_settings(1e-3), on_epoch=on_epoch)
        if number < run.config.correction_rounds:
            name, own = f"gated replies {number + 1}", seed + _ROUND * (number + 1)
            gated = gather.sample(run, name, train, 1, own, head)
            broken = _broken(rule, gated)
            run.log("correction", round=number + 1, replies=len(gated), violations=broken)
            run.say(f"  correction round {number + 1}: {broken} of {len(gated)} gated replies broke the rule")
            fitting += gated
            checking += gather.sample(run, f"held-out {name}", held_out, 1, own + _HELD_OUT, head)
    return Learned()


def _check_taught(run: Run, rule: Rule, replies: Sequence[Reply]) -> None:
    broken = _broken(rule, replies)
    run.say(f"  {broken} of {len(replies)} replies break the rule")
    if not broken:
        assert run.plan.rule is not None
        raise DataError(
            f"none of {len(replies)} replies has a forbidden word ({', '.join(map(repr, run.plan.rule.words))})",
            hint="use prompts that provoke the words, or data with replies that have them",
        )


def _broken(rule: Rule, replies: Sequence[Reply]) -> int:
    return sum(bool(rule.violations(reply.text)) for reply in replies)


def offending_tokens(texts: Sequence[str], rule: Rule) -> list[bool]:
    """Which tokens complete a violation, from the text after each token."""
    offends, before = [], 0
    for text in texts:
        ends = [end for _, end in rule.violations(text)]
        offends.append(any(end > before for end in ends))
        before = max([before, *ends])
    return offends


def rule_table(model: LoadedModel, replies: Sequence[Reply], rule: Rule) -> Table:
    """One row a token written, and one a candidate that was visited and not taken; target 1 where it offends."""
    states: list[Tensor] = []
    offends: list[bool] = []
    for reply in replies:
        texts = token_texts(model, reply.token_ids)
        states.append(reply.states[1:])
        offends += offending_tokens(texts, rule)
        for position in reply.positions:
            before = texts[position.index - 1] if position.index else ""
            already = len(rule.violations(before))
            for candidate, state in zip(position.token_ids, position.states, strict=False):  # the first ones were fed
                if candidate == reply.token_ids[position.index]:
                    continue
                text = token_texts(model, [*reply.token_ids[: position.index], candidate], last=1)[0]
                states.append(state.half().cpu()[None])
                offends.append(len(rule.violations(text)) > already)
    return Table(joined(states), torch.tensor(offends, dtype=torch.float32), torch.ones(len(offends)))


def fit_rule(
    head: MARAHead, train: Table, held_out: Table, *, settings: FitSettings, on_epoch: Callable[[Epoch], None]
) -> list[Epoch]:
    """Fit f to tables of `rule_table`, from wherever the head stands.

    Rare offences are repeated until they make up a tenth of the rows, so that every minibatch holds some.
    """
    offending = (train.targets > 0).nonzero()[:, 0]
    if 0 < len(offending) < len(train) // 10:
        again = offending.repeat(len(train) // 10 // len(offending))
        rows = torch.cat([torch.arange(len(train)), again])
        train = train.take(rows)

    def loss(head: MARAHead, table: Table) -> Tensor:
        return rule_loss(outputs(head, table.states), table.targets > 0)

    return fit(head, train, held_out, loss, settings, on_epoch)
