"""The method `principle`: a head from a sentence. No data, no reward, no judge.

The base model reads its own plain replies again with the sentence as a system prompt. q is fitted to what that changes
in the log-probability of every candidate, against a neutral sentence: what any system prompt changes is no part of it.
The opposite can stand in its place or beside it; it helps some sentences, and harms others. Sentences with weights are
read one by one, and what they change is added.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from mara_integrations.data.principles import NEUTRAL, under
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
from mara_integrations.training.settings.methods import Contrast

CONTRASTS: dict[Contrast, str] = {
    "neutral": "a neutral sentence",
    "opposite": "the opposite",
    "both": "a neutral sentence and the opposite",
}
_HELD_OUT_SEED = 500_000  # offset larger than any number of replies
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


ContrastValues: TypeAlias = Callable[[Run, Side], Tensor]  # what q is fitted to, centred under the base model, (P, K)


def train(run: Run, head: MARAHead) -> MethodResult:
    """Fit q to what the sentence changes, and compare the head with the sentence as a system prompt."""
    return train_on_contrast(run, head, _contrast_values, CONTRASTS[run.config.principle_contrast])


def train_on_contrast(run: Run, head: MARAHead, values: ContrastValues, contrast: str) -> MethodResult:
    """Fit q to values of the candidates of base replies, and compare the head with the sentence of the plan.

    Args:
        run: The run.
        head: The head, fitted in place.
        values: Returns the values.
        contrast: What the replies are read under beside their own prompts, for the metrics.
    """
    assert isinstance(head, QHead)
    train_side, held_out = _base_sides(run)
    _fit(run, head, values, train_side, held_out)
    set_scale(head, scale_within_budget(run, head, held_out.positions))
    seed = run.config.seed + _HELD_OUT_SEED
    gated = Positions.of(generate_replies(run, "held-out gated replies", held_out.prompts, 1, seed, head))
    # on its own replies, which lie further from the base model, the budget may allow less
    set_scale(head, min(head.config.scale, scale_within_budget(run, head, gated)))
    hold_quality(run, head, held_out.prompts, seed)
    kl = kl_per_token(gated, all_scores(head, gated, run.backend.output_embeddings), head.config.scale)
    report_scale(run, head.config.scale, kl)
    baseline = beside_the_prompt(run, head, held_out.prompts[: run.config.eval_prompts])
    return MethodResult(kl_per_token=kl, metrics={"contrast": contrast, **baseline})


def work(run: Run) -> Workload:
    """Return what `train` will do."""
    return work_on_contrast(run, lambda base: [base] * (len(_sentences(run)) + len(_others(run))))


def work_on_contrast(run: Run, rereadings: Callable[[Generation], list[Generation]]) -> Workload:
    """Return what `train_on_contrast` will do; `rereadings` returns which of some base replies are read again."""
    seed, each = run.config.seed, replies_per_prompt(run)
    prompts = limited_prompts(run, run.plan.train, each)
    held_out = limited_prompts(run, run.plan.held_out)
    table = held_out[: min(run.config.eval_prompts, MAX_PROMPTS)]
    base = [
        Generation(prompts, each, seed, is_gated=True, is_base=True),
        Generation(held_out, 1, seed + _HELD_OUT_SEED, is_gated=True, is_base=True),
    ]
    of_table = [Generation(table, is_gated=True)] * 8
    generations = [
        *base,
        Generation(held_out, is_gated=True),
        *greedy_generations(run, held_out, seed + _HELD_OUT_SEED),
        *of_table,
    ]
    return Workload(
        [planned for planned in generations if len(planned)],
        # under the sentence and its contrasts; those of the table with and without the sentence
        rereadings=[planned for planned in (*itertools.chain(*map(rereadings, base)), *of_table * 2) if len(planned)],
        fitted=len(prompts) * each + len(held_out),
    )


def _base_sides(run: Run) -> tuple[Side, Side]:
    """Return base replies to the prompts to fit on and to those held out, with all candidates."""
    untrained, seed = run.new_head().eval(), run.config.seed
    each = replies_per_prompt(run)
    sides = []
    for name, data, count, offset in (
        ("base replies", run.plan.train, each, 0),
        ("held-out base replies", run.plan.held_out, 1, _HELD_OUT_SEED),
    ):
        prompts = limited_prompts(run, data, count)
        run.random().shuffle(prompts)  # the first ones, which the table takes, are to be like the others
        replies = generate_replies(run, name, prompts, count, seed + offset, untrained, is_base=True)
        sides.append(Side.of(name, prompts, replies))
    return sides[0], sides[1]


def _sentences(run: Run) -> dict[str, tuple[str, float]]:
    """Return the sentences to read replies under, each with its weight, by the name of its readings."""
    assert run.plan.principle is not None
    parts = run.plan.principle.parts
    return {"the sentence" if len(parts) == 1 else f"sentence {n}": part for n, part in enumerate(parts, start=1)}


def _others(run: Run) -> dict[str, str]:
    """Return what the sentence is contrasted with, by the name of its readings."""
    assert run.plan.principle is not None
    others: dict[Contrast, str] = {"neutral": NEUTRAL, "opposite": run.plan.principle.against}
    chosen = run.config.principle_contrast
    return {CONTRASTS[name]: sentence for name, sentence in others.items() if chosen in (name, "both")}


def _fit(run: Run, head: QHead, values: ContrastValues, train_side: Side, held_out: Side) -> None:
    """Fit q to the values, in standard deviations."""
    found = [values(run, side) for side in (train_side, held_out)]
    spread = float(found[0][train_side.positions.live].std()) or 1.0
    train_targets, held_out_targets = (
        Targets(side.positions, (value / spread).clamp(-_MAX_TARGET, _MAX_TARGET))
        for side, value in zip((train_side, held_out), found, strict=True)
    )
    regress(run, "fit", head, train_targets, held_out_targets)


def _contrast_values(run: Run, side: Side) -> Tensor:
    """Return what the sentence changes in the log-probability of each candidate, centred under the base model, (P, K).

    A constant of the position, as that of the softmax, falls out. Each contrast of each sentence counts in its own
    standard deviations, times the weight of the sentence.
    """
    log_probs, live = side.positions.log_probs, side.positions.live
    with_sentences = [
        (_read_under(run, side, name, text).candidates, weight) for name, (text, weight) in _sentences(run).items()
    ]
    found = torch.zeros_like(log_probs)
    for name, other in _others(run).items():
        with_other = _read_under(run, side, name, other).candidates
        for with_sentence, weight in with_sentences:
            value = centred(with_sentence - with_other, log_probs)
            found += weight * value / (float(value[live].std()) or 1.0)
    return found


def _read_under(run: Run, side: Side, name: str, sentence: str) -> Rereading:
    """Return what the model makes of a side's replies under a sentence."""
    return read_as(run, side, name, [under(sentence, prompt) for prompt in side.prompts])


def read_as(run: Run, side: Side, name: str, prompts: Sequence[Conversation]) -> Rereading:
    """Return what the model makes of a side's replies after other prompts; each part is stored.

    Args:
        run: The run.
        side: The replies.
        name: Name of the reading in stages.
        prompts: The other prompts, by `Reply.prompt_index`.
    """
    contexts = contexts_of(run.model, prompts, side.replies)
    parts, stage = [], f"{side.name} under {name}"
    with run.stage(stage, len(side.replies)) as advance:
        for start in range(0, len(side.replies), _REPLIES_PER_FILE):
            replies = side.replies[start : start + _REPLIES_PER_FILE]
            read = partial(_read, run, contexts, replies, advance)
            found, was_stored = load_or_compute(run.stored(stage, start), read)
            if was_stored:
                advance(len(replies))
            parts.append(Rereading(**found))
    width = side.positions.token_ids.shape[1]
    wide = [torch.nn.functional.pad(part.candidates, (0, width - part.candidates.shape[1])) for part in parts]
    return Rereading(torch.cat(wide), torch.cat([part.tokens for part in parts]))


def _read(run: Run, contexts: Sequence[Sequence[int]], replies: Sequence[Reply], advance: OnReply) -> object:
    return as_dict(reread(run.backend, contexts, replies, advance))
