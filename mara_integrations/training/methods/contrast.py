"""What methods share that fit q to a contrast: base replies, read again, and how their readings become a head.

A reading is what a model makes of the candidates of a reply, in the reply's own context or another. The difference of
two readings is what q is fitted to. Each method says which readings it takes; see `principle`, `teacher`, `grounding`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mara_integrations.engine.backends.protocol import Backend
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.messages import Conversation
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import limited_prompts, replies_per_prompt
from mara_integrations.training.collect.workload import Generation, Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.learning.fit import Targets
from mara_integrations.training.learning.q_objectives import centred
from mara_integrations.training.methods.q_regression import regress
from mara_integrations.training.records.store import as_dict, load_or_compute
from mara_integrations.training.rollouts.positions import Positions, all_scores
from mara_integrations.training.rollouts.replies import OnReply, Reply
from mara_integrations.training.rollouts.rereading import Rereading, contexts_of, reread
from mara_integrations.training.scoring.prompt_baseline import MAX_PROMPTS, beside_the_prompt
from mara_integrations.training.scoring.q_scale import (
    greedy_generations,
    hold_quality,
    kl_per_token,
    scale_within_budget,
)
from mara_integrations.training.scoring.scale import report_scale, set_scale
from mara_integrations.training.teachers import Reader

HELD_OUT_SEED = 500_000  # offset larger than any number of replies
_REPLIES_PER_FILE = 64
_MAX_TARGET = 5.0  # standard deviations


@dataclass(frozen=True, slots=True)
class Side:
    """Base replies to the prompts of one side, read again.

    Attributes:
        name: Name of the side in stages.
        prompts: The prompts.
        replies: R replies.
        positions: Their positions.
    """

    name: str
    prompts: list[Conversation]
    replies: list[Reply]
    positions: Positions

    @classmethod
    def of(cls, name: str, prompts: list[Conversation], replies: list[Reply]) -> Side:
        """Return a side with the positions of its replies."""
        return cls(name, prompts, replies, Positions.of(replies))


# What q is fitted to on each side, centred under the base model, (P, K).
ContrastValues: TypeAlias = Callable[[Run, Sequence[Side]], list[Tensor]]
ContrastReport: TypeAlias = Callable[[Run, MARAHead, Side], dict[str, Any]]


def report_table(run: Run, head: MARAHead, held_out: Side) -> dict[str, Any]:
    """Compare the head with the sentence of the plan as a system prompt; see `beside_the_prompt`."""
    return beside_the_prompt(run, head, held_out.prompts[: run.config.eval_prompts])


def train_on_contrast(
    run: Run, head: MARAHead, values: ContrastValues, contrast: str, report: ContrastReport = report_table
) -> MethodResult:
    """Fit q to values of the candidates of base replies, scale it, and report on the finished head.

    Args:
        run: The run.
        head: The head, fitted in place.
        values: Returns the values.
        contrast: What the replies are read under beside their own prompts, for the metrics.
        report: Says what the head does to held-out replies, and returns it for the metrics.
    """
    assert isinstance(head, QHead)
    train_side, held_out = _base_sides(run)
    _fit(run, head, values, train_side, held_out)
    set_scale(head, scale_within_budget(run, head, held_out.positions))
    seed = run.config.seed + HELD_OUT_SEED
    gated = Positions.of(generate_replies(run, "held-out gated replies", held_out.prompts, 1, seed, head))
    # on its own replies, which lie further from the base model, the budget may allow less
    set_scale(head, min(head.config.scale, scale_within_budget(run, head, gated)))
    hold_quality(run, head, held_out.prompts, seed)
    kl = kl_per_token(gated, all_scores(head, gated, run.backend.output_embeddings), head.config.scale)
    report_scale(run, head.config.scale, kl)
    return MethodResult(kl_per_token=kl, metrics={"contrast": contrast, **report(run, head, held_out)})


def work_on_contrast(
    run: Run, rereadings: Callable[[Generation], list[Generation]], reporting: Workload | None = None
) -> Workload:
    """Return what `train_on_contrast` will do.

    Args:
        run: The run.
        rereadings: Returns which of some base replies are read again.
        reporting: What the report will do; None is that of `report_table`.
    """
    reporting = reporting or work_of_table(run)
    seed, each = run.config.seed, replies_per_prompt(run)
    prompts = limited_prompts(run, run.plan.train, each)
    held_out = limited_prompts(run, run.plan.held_out)
    base = [
        Generation(prompts, each, seed, is_gated=True, is_base=True),
        Generation(held_out, 1, seed + HELD_OUT_SEED, is_gated=True, is_base=True),
    ]
    generations = [
        *base,
        Generation(held_out, is_gated=True),
        *greedy_generations(run, held_out, seed + HELD_OUT_SEED),
        *reporting.generations,
    ]
    again = [*itertools.chain(*map(rereadings, base)), *reporting.rereadings]
    return Workload(
        [planned for planned in generations if len(planned)],
        rereadings=[planned for planned in again if len(planned)],
        fitted=len(prompts) * each + len(held_out),
    )


def work_of_table(run: Run) -> Workload:
    """Return what `report_table` will do: its replies are read with and without the sentence."""
    held_out = limited_prompts(run, run.plan.held_out)
    of_table = [Generation(held_out[: min(run.config.eval_prompts, MAX_PROMPTS)], is_gated=True)] * 8
    return Workload(of_table, rereadings=of_table * 2)


def summed_contrasts(
    positions: Positions, these: Sequence[tuple[Tensor, float]], those: Sequence[Tensor], aside: Sequence[int] = ()
) -> Tensor:
    """Return the sum of the differences of each of these readings from each of those, (P, K).

    Each difference is centred under the base model, so that a constant of the position, as that of the softmax, falls
    out. It counts in its own standard deviations, times the weight of the reading.

    Args:
        positions: The P positions.
        these: Readings of their candidates, each (P, K) in nats, and its weight.
        those: What they differ from, each (P, K).
        aside: Tokens that the readings say nothing of: their values are 0.
    """
    log_probs, live = positions.log_probs, positions.live
    if len(aside):
        log_probs = log_probs.masked_fill(torch.isin(positions.token_ids, torch.tensor(aside)), -torch.inf)
    found = torch.zeros_like(log_probs)
    for that in those:
        for this, weight in these:
            value = centred(this - that, log_probs)
            found += weight * value / (float(value[live].std()) or 1.0)
    return found


def read_as(
    run: Run, side: Side, name: str, prompts: Sequence[Conversation], reader: Reader | None = None
) -> Rereading:
    """Return what a model makes of a side's replies after other prompts; each part is stored.

    Args:
        run: The run.
        side: The replies.
        name: Name of the reading in stages.
        prompts: The other prompts, by `Reply.prompt_index`.
        reader: What reads them, in its own chat template; None is the run's model.
    """
    model, backend = (run.model, run.backend) if reader is None else (reader.model, reader.backend)
    contexts = contexts_of(model, prompts, side.replies)
    parts, stage = [], f"{side.name} {name}"
    with run.stage(stage, len(side.replies)) as advance:
        for start in range(0, len(side.replies), _REPLIES_PER_FILE):
            replies = side.replies[start : start + _REPLIES_PER_FILE]
            read = partial(_read, backend, contexts, replies, advance)
            found, was_stored = load_or_compute(run.stored(stage, start), read)
            if was_stored:
                advance(len(replies))
            parts.append(Rereading(**found))
    width = side.positions.token_ids.shape[1]
    wide = [torch.nn.functional.pad(part.candidates, (0, width - part.candidates.shape[1])) for part in parts]
    return Rereading(torch.cat(wide), torch.cat([part.tokens for part in parts]))


def _read(backend: Backend, contexts: Sequence[Sequence[int]], replies: Sequence[Reply], advance: OnReply) -> object:
    return as_dict(reread(backend, contexts, replies, advance))


def _base_sides(run: Run) -> tuple[Side, Side]:
    """Return base replies to the prompts to fit on and to those held out, with all candidates."""
    untrained, seed = run.new_head().eval(), run.config.seed
    each = replies_per_prompt(run)
    sides = []
    for name, data, count, offset in (
        ("base replies", run.plan.train, each, 0),
        ("held-out base replies", run.plan.held_out, 1, HELD_OUT_SEED),
    ):
        prompts = limited_prompts(run, data, count)
        run.random().shuffle(prompts)  # the first ones, which the table takes, are to be like the others
        replies = generate_replies(run, name, prompts, count, seed + offset, untrained, is_base=True)
        sides.append(Side.of(name, prompts, replies))
    return sides[0], sides[1]


def _fit(run: Run, head: QHead, values: ContrastValues, train_side: Side, held_out: Side) -> None:
    """Fit q to the values, in standard deviations."""
    sides = (train_side, held_out)
    found = values(run, sides)
    spread = float(found[0][train_side.positions.live].std()) or 1.0
    train_targets, held_out_targets = (
        Targets(side.positions, (value / spread).clamp(-_MAX_TARGET, _MAX_TARGET))
        for side, value in zip(sides, found, strict=True)
    )
    regress(run, "fit", head, train_targets, held_out_targets)
