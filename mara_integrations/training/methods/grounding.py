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

import torch
from torch import Tensor

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
from mara_integrations.training.methods.readings import Side, read_as


def train(run: Run, head: MARAHead) -> MethodResult:
    """Fit q to what the documents change, and compare the head with a sentence that asks for the same."""
    return train_on_contrast(run, head, contrast_values, "prompts without documents, and a neutral sentence")


def work(run: Run) -> Workload:
    """Return what `train` will do."""
    rows = _rows(run)

    def rereadings(base: Generation) -> list[Generation]:
        parts = [
            [prompt for prompt in base.prompts if _is_answerable(rows, prompt) is side]
            for side in (True, False, False)  # without documents; under the sentence; under the neutral one
        ]
        return [Generation(part, base.replies_per_prompt, base.seed) for part in parts]

    return work_on_contrast(run, rereadings)


def contrast_values(run: Run, sides: Sequence[Side]) -> list[Tensor]:
    """Return what q is fitted to, centred under the base model, (P, K) a side.

    Each of the two contrasts counts in its own standard deviations.
    """
    return [_values(run, side, _rows(run)) for side in sides]


def _values(run: Run, side: Side, rows: dict[Conversation, PromptRow]) -> Tensor:
    answerable = torch.tensor([_is_answerable(rows, side.prompts[reply.prompt_index]) for reply in side.replies])
    found = torch.zeros_like(side.positions.log_probs)
    for is_answerable in (True, False):
        replies = [
            reply for reply, is_one in zip(side.replies, answerable.tolist(), strict=True) if is_one is is_answerable
        ]
        if not any(reply.positions for reply in replies):
            continue
        part = Side.of(f"{'' if is_answerable else 'un'}answerable {side.name}", side.prompts, replies)
        value = _without_documents(run, part, rows) if is_answerable else _admitting(run, part)
        value /= float(value[part.positions.live].std()) or 1.0
        found[answerable[side.positions.replies] == is_answerable, : value.shape[1]] = value
    return found


def _without_documents(run: Run, side: Side, rows: dict[Conversation, PromptRow]) -> Tensor:
    """Return what the documents change in the log-probabilities of the candidates, (P, K)."""
    log_probs = side.positions.log_probs
    system_prompt = run.config.system_prompt
    alone = [
        Conversation(question_alone(rows[prompt]), prompt.tools).with_system(system_prompt) for prompt in side.prompts
    ]
    return centred(log_probs - read_as(run, side, "under the question alone", alone).candidates, log_probs)


def _admitting(run: Run, side: Side) -> Tensor:
    """Return what the sentence changes where the documents do not hold the answer, (P, K)."""
    with_sentence, neutral = (
        read_as(run, side, f"under {name}", [under(sentence, prompt) for prompt in side.prompts]).candidates
        for name, sentence in (("the sentence", GROUNDED), ("a neutral sentence", NEUTRAL))
    )
    return centred(with_sentence - neutral, side.positions.log_probs)


def _rows(run: Run) -> dict[Conversation, PromptRow]:
    """Return the rows of both sides by their prompts."""
    rows = (*run.plan.train.rows, *run.plan.held_out.rows)
    return {conversation(run, row): row for row in rows if isinstance(row, PromptRow)}


def _is_answerable(rows: dict[Conversation, PromptRow], prompt: Conversation) -> bool:
    return bool(rows[prompt].columns["answerable"])
