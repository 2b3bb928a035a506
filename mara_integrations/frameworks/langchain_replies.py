"""LangChain's messages from what the engine writes: text, thoughts, calls, usage and the report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
)
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.utils.json import parse_partial_json

from mara_integrations.engine.generation import Generation
from mara_integrations.engine.tickets import Update
from mara_integrations.errors import ConfigError
from mara_integrations.replies.calls import Call, Piece
from mara_integrations.runtime import MARAEngine


class LangChainReply:
    """Makes LangChain's messages of what the engine writes to one request; all of it after the model was loaded."""

    def __init__(self, engine: MARAEngine, settings: dict[str, Any], top_logprobs: int | None) -> None:
        self.settings = settings
        self._engine = engine
        self._top_logprobs = top_logprobs
        self._has_trace = engine.given(**settings).get("trace", False)
        if top_logprobs is not None:
            settings.update(engine.log_prob_settings(top_logprobs))

    def result(self, generation: Generation) -> ChatResult:
        """Return the whole reply."""
        thoughts = generation.thoughts
        message = AIMessage(
            content=generation.text,
            additional_kwargs={"reasoning_content": thoughts} if thoughts else {},
            response_metadata=self._report(generation),
            usage_metadata=_usage(generation),
        )
        for call in generation.calls:
            arguments = call.parsed
            if arguments is not None:
                message.tool_calls.append(tool_call(name=call.name, args=arguments, id=call.id))
            else:
                error = f"{call.error} (finish_reason {generation.finish_reason!r})"
                invalid = invalid_tool_call(name=call.name, args=call.arguments, id=call.id, error=error)
                message.invalid_tool_calls.append(invalid)
        generation_info = {"finish_reason": generation.finish_reason}
        return ChatResult(
            generations=[ChatGeneration(message=message, generation_info=generation_info)],
            llm_output={"model_name": message.response_metadata["model_name"]},
        )

    def chunks(self, update: Update) -> Iterator[ChatGenerationChunk]:
        """Chunks of one update; usage and report come once, with the last."""
        for piece in update.pieces:
            if piece.call is None or piece.call.name:
                yield ChatGenerationChunk(message=_chunk(piece))
        if update.generation is None:
            return
        for call in update.calls:
            if call.error is not None:
                yield ChatGenerationChunk(message=_invalid(call))
        message = AIMessageChunk(
            content="",
            response_metadata=self._report(update.generation),
            usage_metadata=_usage(update.generation),
            chunk_position="last",
        )
        yield ChatGenerationChunk(message=message, generation_info={"finish_reason": update.generation.finish_reason})

    def _report(self, generation: Generation) -> dict[str, Any]:
        return self._engine.report(generation, has_trace=self._has_trace, top_logprobs=self._top_logprobs)


def _chunk(piece: Piece) -> AIMessageChunk:
    """LangChain's form of a piece; the id and name of a call come with the first of its chunks."""
    if piece.thoughts:
        return AIMessageChunk(content="", additional_kwargs={"reasoning_content": piece.thoughts})
    if piece.call is None:
        return AIMessageChunk(content=piece.text)
    call, is_first = piece.call, not piece.call.arguments
    chunk = tool_call_chunk(
        name=call.name if is_first else None,
        args=call.arguments,
        id=call.id if is_first else None,
        index=call.index,
    )
    return AIMessageChunk(content="", tool_call_chunks=[chunk])


def _invalid(call: Call) -> AIMessageChunk:
    """Return the chunk that makes those of a call add up to an invalid call; it is all of a call without a name."""
    spoiled = _spoiled(call.arguments)
    if call.name:
        chunk = tool_call_chunk(name=None, args=spoiled, id=None, index=call.index)
    else:
        chunk = tool_call_chunk(name="", args=call.arguments + spoiled, id=call.id, index=call.index)
    return AIMessageChunk(content="", tool_call_chunks=[chunk])


def take_top_logprobs(call: dict[str, Any]) -> int | None:
    """Pop the arguments that ask for log-probabilities from `call`; None: they are not wanted."""
    is_wanted, count = call.pop("logprobs", None), call.pop("top_logprobs", None)
    if is_wanted not in (None, True, False):
        raise ConfigError(f"logprobs={is_wanted!r} is not allowed", hint="it is True or False; see top_logprobs")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
        raise ConfigError(f"top_logprobs={count!r} is not allowed", hint="it is a number of tokens, 0 or more")
    if is_wanted is False or (is_wanted is None and count is None):
        return None
    return count or 0


def _spoiled(arguments: str) -> str:
    """Return what to add to the arguments of a broken call, so that its chunks add up to an invalid call.

    LangChain completes JSON that breaks off when it adds chunks, and would make a whole call of half a one. It does not
    complete a bracket that matches none.
    """
    for end in ("", "]", "}", '"]', '"}', '""]', '""}'):  # in an object, in a list, in a string, after a backslash
        try:
            read = parse_partial_json(arguments + end) if arguments + end else {}
        except ValueError:
            return end
        if not isinstance(read, dict):
            return end
    return ""


def _usage(generation: Generation) -> UsageMetadata:
    sizes = generation.prompt_tokens, generation.completion_tokens
    return UsageMetadata(input_tokens=sizes[0], output_tokens=sizes[1], total_tokens=sum(sizes))
