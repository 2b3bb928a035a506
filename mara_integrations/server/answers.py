"""What is answered: the engine's replies in the objects of OpenAI's API, whole or in chunks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any
from uuid import uuid4

from mara_integrations.engine.generation import Generation
from mara_integrations.engine.worker import Update
from mara_integrations.frameworks.answers import call_parser, log_prob_report, thought_splitter
from mara_integrations.models.load import LoadedModel
from mara_integrations.replies.reasoning import ThoughtSplitter
from mara_integrations.replies.tool_calls import CallParser, Piece
from mara_integrations.server.requests import Asked


class _Answer:
    """What both kinds of answers share."""

    prefix, whole_object, part_object = "", "", ""

    def __init__(self, asked: Asked, model: LoadedModel) -> None:
        self.asked, self.model = asked, model
        self._id, self._created = f"{self.prefix}-{uuid4().hex}", int(time.time())

    def _about(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.asked.model}

    def _whole(self, choices: list[dict[str, Any]], generations: Sequence[Generation]) -> dict[str, Any]:
        gate = [asdict(generation.stats) for generation in generations]
        about = self._about(self.whole_object)
        return {**about, "choices": choices, "usage": usage(generations), "gate": gate[0] if len(gate) == 1 else gate}

    def _part(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self._about(self.part_object), "choices": choices, **more}

    def _counts(self, generation: Generation) -> Iterator[dict[str, Any]]:
        if self.asked.has_usage:
            yield self._part([], usage=usage([generation]))


class ChatAnswer(_Answer):
    """The answer to a chat."""

    prefix, whole_object, part_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    @cached_property
    def _parser(self) -> CallParser | None:
        return call_parser(self.asked.settings, self.model)

    @cached_property
    def _splitter(self) -> ThoughtSplitter:
        return thought_splitter(self.model)

    def whole(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """The answer in one piece."""
        (generation,) = generations
        thoughts, text = self._splitter.push(generation.text, final=True)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thoughts:
            message["reasoning_content"] = thoughts
        if self._parser is not None:
            message["content"] = "".join(piece.text for piece in self._parser.push(text, final=True)) or None
            if self._parser.calls:
                message["tool_calls"] = [
                    {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                    for call in self._parser.calls
                ]
        return self._whole([{"index": 0, "message": message, **self._end(generation)}], generations)

    def parts(self, update: Update, is_first: bool) -> Iterator[dict[str, Any]]:
        """The chunks of one update; reason, log-probabilities and usage come with the last."""
        if is_first:
            yield self._delta({"role": "assistant", "content": ""})
        is_last = update.generation is not None
        thoughts, text = self._splitter.push(update.text, final=is_last)
        if thoughts:
            yield self._delta({"reasoning_content": thoughts})
        for piece in self._parser.push(text, final=is_last) if self._parser else [Piece(text)]:
            if piece.call is not None:
                yield self._delta({"tool_calls": [_called(piece)]})
            elif piece.text:
                yield self._delta({"content": piece.text})
        if update.generation is not None:
            yield self._part([{"index": 0, "delta": {}, **self._end(update.generation)}])
            yield from self._counts(update.generation)

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return self._part([{"index": 0, "delta": delta, "finish_reason": None}])

    def _end(self, generation: Generation) -> dict[str, Any]:
        calls = self._parser.calls if self._parser else []
        is_called = bool(calls) and all(call.error is None for call in calls)
        reason = "tool_calls" if is_called else generation.finish_reason
        if self.asked.top_logprobs is None:
            return {"finish_reason": reason, "logprobs": None}
        return {"finish_reason": reason, "logprobs": log_prob_report(generation, self.model, self.asked.top_logprobs)}


class CompletionAnswer(_Answer):
    """The answer to a completion."""

    prefix, whole_object, part_object = "cmpl", "text_completion", "text_completion"

    def whole(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """The answer in one piece, a choice for each prompt."""
        choices = [
            {"index": index, "text": generation.text, **self._end(generation)}
            for index, generation in enumerate(generations)
        ]
        return self._whole(choices, generations)

    def parts(self, update: Update, is_first: bool) -> Iterator[dict[str, Any]]:
        """The chunks of one update."""
        if update.text and update.generation is None:
            yield self._part([{"index": 0, "text": update.text, "finish_reason": None, "logprobs": None}])
        elif update.generation is not None:
            yield self._part([{"index": 0, "text": update.text, **self._end(update.generation)}])
            yield from self._counts(update.generation)

    def _end(self, generation: Generation) -> dict[str, Any]:
        if self.asked.top_logprobs is None:
            return {"finish_reason": generation.finish_reason, "logprobs": None}
        report = log_prob_report(generation, self.model, self.asked.top_logprobs)["content"]
        texts = [token["token"] for token in report]
        offsets = [sum(map(len, texts[:i])) for i in range(len(texts))]
        logprobs = {
            "tokens": texts,
            "token_logprobs": [token["logprob"] for token in report],
            "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in report],
            "text_offset": offsets,
        }
        return {"finish_reason": generation.finish_reason, "logprobs": logprobs}


def usage(generations: Sequence[Generation]) -> dict[str, int]:
    """The counts of tokens."""
    prompt = sum(generation.prompt_tokens for generation in generations)
    completion = sum(len(generation.token_ids) for generation in generations)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _called(piece: Piece) -> dict[str, Any]:
    """The next part of a call; its id and name come with the first."""
    assert piece.call is not None
    call = piece.call
    if not call.arguments:
        function = {"name": call.name, "arguments": ""}
        return {"index": call.index, "id": call.id, "type": "function", "function": function}
    return {"index": call.index, "function": {"arguments": call.arguments}}
