"""The engine's replies as the objects of OpenAI's API, whole or in chunks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Any
from uuid import uuid4

from mara_integrations.engine.answers import log_prob_report
from mara_integrations.engine.generation import Generation
from mara_integrations.engine.tickets import Update
from mara_integrations.models.load import LoadedModel
from mara_integrations.replies.calls import Call
from mara_integrations.server.objects import (
    CallOfReply,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChoice,
    FinishReason,
    ReplyMessage,
    Usage,
)
from mara_integrations.server.requests import EngineCall


class ChatAnswer:
    """The answer to a chat; belongs to one request.

    Args:
        call: The request.
        model: The model that replies.
    """

    def __init__(self, call: EngineCall, model: LoadedModel) -> None:
        self._call, self._model = call, model
        self._id, self._created = f"chatcmpl-{uuid4().hex}", int(time.time())

    def whole(self, generations: Sequence[Generation]) -> ChatCompletion:
        """Return the answer in one piece."""
        (generation,) = generations
        message: ReplyMessage = {"role": "assistant", "content": generation.text}
        if generation.thoughts:
            message["reasoning_content"] = generation.thoughts
        if calls := [call for call in generation.calls if call.name]:
            message["content"] = message["content"] or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        reason = self._finish_reason(generation)
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._call.model,
            "choices": [
                {"index": 0, "message": message, "finish_reason": reason, "logprobs": self._log_probs(generation)}
            ],
            "usage": usage(generations),
            "gate": asdict(generation.stats),
        }

    def chunks(self, update: Update, is_first: bool) -> Iterator[ChatCompletionChunk]:
        """Return the chunks of one update; finish reason, log-probabilities and usage come with the last."""
        if is_first:
            yield self._chunk({"role": "assistant", "content": ""})
        for piece in update.pieces:
            if piece.thoughts:
                yield self._chunk({"reasoning_content": piece.thoughts})
            elif piece.text:
                yield self._chunk({"content": piece.text})
            elif piece.call is not None and piece.call.name:
                yield self._chunk({"tool_calls": [_part_of_call(piece.call)]})
        if update.generation is not None:
            last = self._chunk({}, self._finish_reason(update.generation))
            last["choices"][0]["logprobs"] = self._log_probs(update.generation)
            yield last
            if self._call.has_usage:
                counts = self._chunk({})
                counted = usage([update.generation])
                yield {**counts, "choices": [], "usage": counted, "gate": asdict(update.generation.stats)}

    def _chunk(self, delta: ReplyMessage, reason: FinishReason | None = None) -> ChatCompletionChunk:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._call.model,
            "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
        }

    def _finish_reason(self, generation: Generation) -> FinishReason:
        is_call = bool(generation.calls) and all(call.error is None for call in generation.calls)
        if generation.finish_reason == "stop" and is_call:
            return "tool_calls"
        return generation.finish_reason

    def _log_probs(self, generation: Generation) -> dict[str, Any] | None:
        if self._call.top_logprobs is None:
            return None
        return log_prob_report(generation, self._model, self._call.top_logprobs)


class CompletionAnswer:
    """The answer to a completion; see `ChatAnswer`. It is the raw text, since the API has no place for thoughts."""

    def __init__(self, call: EngineCall, model: LoadedModel) -> None:
        self._call, self._model = call, model
        self._id, self._created = f"cmpl-{uuid4().hex}", int(time.time())

    def whole(self, generations: Sequence[Generation]) -> Completion:
        """Return the answer in one piece, with a choice for each prompt."""
        choices = [self._last(index, generation.raw_text, generation) for index, generation in enumerate(generations)]
        gate = [asdict(generation.stats) for generation in generations]
        counts = {"usage": usage(generations), "gate": gate[0] if len(gate) == 1 else gate}
        return {**self._object(choices), **counts}  # type: ignore[typeddict-item]  # mypy can't join the two

    def chunks(self, update: Update, is_first: bool) -> Iterator[Completion]:
        """Return the chunks of one update; finish reason, log-probabilities and usage come with the last."""
        if update.generation is not None:
            yield self._object([self._last(0, update.raw_text, update.generation)])
            if self._call.has_usage:
                counts = {"usage": usage([update.generation]), "gate": asdict(update.generation.stats)}
                yield {**self._object([]), **counts}  # type: ignore[typeddict-item]  # as above
        elif update.raw_text:
            yield self._object([{"index": 0, "text": update.raw_text, "finish_reason": None, "logprobs": None}])

    def _object(self, choices: list[CompletionChoice]) -> Completion:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._call.model,
            "choices": choices,
        }

    def _last(self, index: int, text: str, generation: Generation) -> CompletionChoice:
        logprobs = self._log_probs(generation)
        return {"index": index, "text": text, "finish_reason": generation.finish_reason, "logprobs": logprobs}

    def _log_probs(self, generation: Generation) -> dict[str, Any] | None:
        if self._call.top_logprobs is None:
            return None
        report = log_prob_report(generation, self._model, self._call.top_logprobs)["content"]
        texts = [token["token"] for token in report]
        return {
            "tokens": texts,
            "token_logprobs": [token["logprob"] for token in report],
            "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in report],
            "text_offset": list(accumulate(map(len, texts), initial=0))[: len(texts)],
        }


def usage(generations: Sequence[Generation]) -> Usage:
    """Return the counts of tokens."""
    prompt = sum(generation.prompt_tokens for generation in generations)
    completion = sum(len(generation.token_ids) for generation in generations)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _part_of_call(call: Call) -> CallOfReply:
    """Return the next part of a call; its id and name come with the first."""
    if not call.arguments:
        function = {"name": call.name, "arguments": ""}
        return {"index": call.index, "id": call.id, "type": "function", "function": function}  # type: ignore[typeddict-item]
    return {"index": call.index, "function": {"arguments": call.arguments}}
