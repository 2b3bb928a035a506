"""The method `grounding`: a head that answers from the documents of a prompt, and says where they hold no answer.

Each question is asked with its own documents, and with those of another question. The base model reads its replies to
the first again without the documents: q is fitted to what the documents change in the log-probability of every
candidate. It reads its replies to the others again under a sentence that asks to admit a missing answer, and q is
fitted to what that changes against a neutral sentence.

Source: Shi et al. 2023, context-aware decoding (arXiv 2305.14739), whose contrast is the target where the documents are
the right ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mara_integrations.data import PromptRow
from mara_integrations.data.documents import GROUNDED, question_alone
from mara_integrations.data.principles import NEUTRAL, under
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Conversation
from mara_integrations.training.collect.prompts import conversation
from mara_integrations.training.collect.workload import Generation, Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.learning.q_objectives import centred
from mara_integrations.training.methods.contrast import train_on_contrast, work_on_contrast
from mara_integrations.training.methods.readings import (
    Difference,
    Opinion,
    Side,
    as_generated,
    mean_of_replies,
    read_as,
)
from mara_integrations.training.rollouts.rereading import Rereading


def train(run: Run, head: MARAHead) -> MethodResult:
    """Fit q to what the documents change, and compare the head with a sentence that asks for the same."""
    return train_on_contrast(run, head, differences, "prompts without documents, and a neutral sentence")


def work(run: Run) -> Workload:
    """Return what `train` will do."""
    rows = _rows(run)

    def rereadings(planned: Generation) -> list[Generation]:
        parts = [
            [prompt for prompt in planned.prompts if _is_answerable(rows, prompt) is side]
            for side in (True, False, False)  # without documents; under the sentence; under the neutral one
        ]
        return [replace(planned, prompts=part) for part in parts]

    return work_on_contrast(run, rereadings)


def differences(run: Run, sides: Sequence[Side]) -> list[Difference]:
    """Return what documents, or the sentence, change in the log-probability of each candidate of each side.

    Each of the two contrasts counts in its own standard deviations.
    """
    return [_difference(run, side, _rows(run)) for side in sides]


def _difference(run: Run, side: Side, rows: dict[Conversation, PromptRow]) -> Difference:
    is_answerable = [_is_answerable(rows, side.prompts[reply.prompt_index]) for reply in side.generated]
    values, opinions = torch.zeros_like(side.positions.log_probs), dict[str, Opinion]()
    for which in (True, False):
        is_kept = [one is which for one in is_answerable]
        if not any(reply.positions for reply, kept in zip(side.generated, is_kept, strict=True) if kept):
            continue
        part = side.only("answerable" if which else "unanswerable", is_kept)
        this, that = _with_and_without_documents(run, part, rows) if which else _admitting(run, part)
        value = centred(this.candidates - that.candidates, part.positions.log_probs)
        value /= float(value[part.positions.live].std()) or 1.0
        values[torch.tensor(is_kept)[side.positions.replies], : value.shape[1]] = value
        scores = iter(mean_of_replies(part.generated, this.tokens - that.tokens))
        name = "contrast of the documents" if which else "contrast of the sentence"
        opinions[name] = Opinion(1.0, [next(scores) if kept else None for kept in is_kept])
    return Difference(values, opinions)


def _with_and_without_documents(
    run: Run, side: Side, rows: dict[Conversation, PromptRow]
) -> tuple[Rereading, Rereading]:
    """Return what the model makes of replies with their documents, as it did, and without them."""
    system_prompt = run.config.system_prompt
    alone = [
        Conversation(question_alone(rows[prompt]), prompt.tools).with_system(system_prompt) for prompt in side.prompts
    ]
    return as_generated(side), read_as(run, side, "under the question alone", alone)


def _admitting(run: Run, side: Side) -> tuple[Rereading, Rereading]:
    """Return what the model makes of replies under the sentence, and under a neutral one."""
    with_sentence, neutral = (
        read_as(run, side, f"under {name}", [under(sentence, prompt) for prompt in side.prompts])
        for name, sentence in (("the sentence", GROUNDED), ("a neutral sentence", NEUTRAL))
    )
    return with_sentence, neutral


def _rows(run: Run) -> dict[Conversation, PromptRow]:
    """Return the rows of both sides by their prompts."""
    rows = (*run.plan.train.rows, *run.plan.held_out.rows)
    return {conversation(run, row): row for row in rows if isinstance(row, PromptRow)}


def _is_answerable(rows: dict[Conversation, PromptRow], prompt: Conversation) -> bool:
    return bool(rows[prompt].columns["answerable"])
