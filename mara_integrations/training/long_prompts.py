"""Prompts that leave no room for a reply in the model's context window: found before the model is loaded.

Where a head is trained from a sentence, the prompts are also read, and replied to, with the sentence before them.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import compress

from mara_integrations.data import Dataset, Row
from mara_integrations.data.principles import under
from mara_integrations.errors import ConfigError, DataError
from mara_integrations.messages import Conversation, PromptEncoder
from mara_integrations.models.load import LoadedModel, Outline
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.plan import Plan

_TEMPLATE_BYTES = 2_000  # more than a chat template adds to a prompt


def without_long_prompts(config: TrainConfig, plan: Plan, model: LoadedModel | Outline) -> tuple[Plan, str | None]:
    """Return the plan without prompts that are too long, and a sentence about them if there are any.

    Args:
        config: Settings of the run.
        plan: The plan.
        model: The model, or its tokenizer and context window.

    Raises:
        DataError: If there are such prompts and bad rows are not to be left out, or if no others are left on a side.
    """
    room = model.context_window - min(config.max_reply_tokens, model.context_window // 2)
    encoder = PromptEncoder(model.tokenizer, max_tokens=model.context_window)
    sentences = plan.principle.sentences if plan.principle is not None else ()
    longest = max((len(sentence.encode()) for sentence in sentences), default=0)
    long: list[Row] = []

    def is_long(row: Row) -> bool:
        prompt = Conversation(row.prompt, row.tools).with_system(config.system_prompt)
        num_bytes = sum(len(message.content.encode()) for message in prompt.messages) + len(repr(row.tools))
        if num_bytes + longest + _TEMPLATE_BYTES <= room:  # a token has a byte at least
            return False
        try:
            return any(len(encoder.encode(each)) > room for each in [prompt, *(under(s, prompt) for s in sentences)])
        except ConfigError:  # too long to be tokenised at all
            return True

    def shortened(data: Dataset) -> Dataset:
        flags = [is_long(row) for row in data.rows]
        long.extend(compress(data.rows, flags))
        kept = tuple(row for row, flag in zip(data.rows, flags, strict=True) if not flag)
        return replace(data, rows=kept) if any(flags) else data

    train, held_out = shortened(plan.train), shortened(plan.held_out)
    others = plan.other_prompts and (shortened(plan.other_prompts[0]), shortened(plan.other_prompts[1]))
    if not long:
        return plan, None
    is_one = len(long) == 1
    prompts, leave, them = ("1 prompt", "leaves", "it") if is_one else (f"{len(long)} prompts", "leave", "them")
    with_sentence = f", with the sentence before {them}," if sentences else ""
    reason = (
        f"{prompts}{with_sentence} {leave} no room for replies of {config.max_reply_tokens} tokens in the model's "
        f"context window of {model.context_window} tokens"
    )
    if not config.skip_bad_rows:
        raise DataError(
            f"{long[0].source}: the prompt is too long ({reason})",
            hint="shorten it, choose shorter replies with --max-reply-tokens, or leave out such rows with "
            "--skip-bad-rows",
        )
    if not all(map(len, (train, held_out, *(others or ())))):
        raise DataError(f"{plan.train.path}: no prompt is left to fit on or to hold out: {reason}")
    shorter = replace(plan, train=train, held_out=held_out, other_prompts=others)
    return shorter, f"left out: {reason} (first: {long[0].source})"
