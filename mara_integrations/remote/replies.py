"""Replies as a server streams them: its chunks as the updates of an engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from mara_integrations.engine.generation import FinishReason, GateStats, Generation
from mara_integrations.engine.tickets import Update
from mara_integrations.errors import ServerError
from mara_integrations.replies.calls import CUT, Call, Piece, json_object, more_arguments, new_call


@dataclass(frozen=True, slots=True)
class ServerGeneration(Generation):
    """A finished reply. A server tells no token ids and no raw text, so both are empty.

    Attributes:
        num_tokens: Length of the reply as the server counts it; 0 where it does not.
        model_name: The model as the server names it.
        gate: What the gate did, where the server tells it.
        token_reports: Log-probabilities token by token, in the form of OpenAI's API; None where none came.
    """

    num_tokens: int = 0
    model_name: str = ""
    gate: dict[str, int] | None = None
    token_reports: list[dict[str, Any]] | None = None

    @property
    def completion_tokens(self) -> int:
        """See `Generation`."""
        return self.num_tokens

    def report(self) -> dict[str, Any]:
        """Return what the reply says about itself; see `MARAEngine.report`."""
        report: dict[str, Any] = {"model_name": self.model_name, "finish_reason": self.finish_reason}
        if self.gate is not None:
            report["gate"] = self.gate
        if self.token_reports is not None:
            report["logprobs"] = {"content": self.token_reports}
        return report


async def updates(chunks: AsyncIterator[Any], *, must_call: bool = False) -> AsyncGenerator[Update, None]:
    """Return the updates of a stream of chunks, of a chat or a completion; the last has the whole reply.

    Args:
        chunks: As OpenAI's client gives them.
        must_call: Whether the request left the model no choice but to call a tool.

    Raises:
        ServerError: If the stream ends before the reply does.
    """
    reply = _Reply(must_call)
    async for chunk in chunks:
        if pieces := reply.read(chunk):
            yield reply.update(pieces)
    if reply.finish_reason is None:
        raise ServerError("the server ended its answer before the reply was finished", hint="ask again")
    yield reply.update(reply.end(reply.finish_reason), is_last=True)


@dataclass(slots=True)
class _Reply:
    """A reply as far as it was read."""

    must_call: bool
    pieces: list[Piece] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    _by_index: dict[int, Call] = field(default_factory=dict)
    _ends_with_call: bool = False
    _token_reports: list[dict[str, Any]] = field(default_factory=list)
    _usage: Any = None
    _last: Any = None

    def read(self, chunk: Any) -> list[Piece]:
        """Read a chunk, and return what it brings of the reply."""
        self._last, self._usage = chunk, chunk.usage or self._usage
        pieces: list[Piece] = []
        for choice in chunk.choices:
            if choice.finish_reason is not None:
                self.finish_reason = "length" if choice.finish_reason == "length" else "stop"
            delta = getattr(choice, "delta", None)
            if delta is None:  # of a completion
                pieces += [Piece(choice.text)] if choice.text else []
                self._token_reports += _as_in_chats(choice.logprobs)
                continue
            pieces += self._read(delta)
            if choice.logprobs is not None:
                self._token_reports += [token.model_dump() for token in choice.logprobs.content or ()]
        self.pieces += pieces
        return pieces

    def end(self, finish_reason: FinishReason) -> list[Piece]:
        """Say which calls are not whole; of a call that had to be made and was cut, nothing may have come."""
        pieces: list[Piece] = []
        is_cut = finish_reason == "length"
        if is_cut and self.must_call and not self.calls:
            pieces, self._ends_with_call = [new_call(self.calls, "")], True
        for call in self.calls:
            call.arguments = call.arguments or "{}"  # as some servers write a call without any
            if not call.name or json_object(call.arguments) is None:
                call.error = "the arguments are not a JSON object"
        if is_cut and self._ends_with_call:
            self.calls[-1].error = CUT
        return pieces

    def update(self, pieces: list[Piece], *, is_last: bool = False) -> Update:
        """Return the update that brings some pieces."""
        calls = tuple(replace(call) for call in self.calls)
        return Update("", (), tuple(pieces), calls, self._generation(calls) if is_last else None)

    def _read(self, delta: Any) -> list[Piece]:
        thoughts = _extra(delta, "reasoning_content") or _extra(delta, "reasoning")  # vLLM's newer name
        pieces = [Piece(thoughts=thoughts)] if thoughts else []
        if delta.content:
            pieces.append(Piece(delta.content))
            self._ends_with_call = self._ends_with_call and not delta.content.strip()
        for part in delta.tool_calls or ():
            pieces += self._read_call(part)
        return pieces

    def _read_call(self, part: Any) -> list[Piece]:
        name, arguments = (part.function.name, part.function.arguments) if part.function else (None, None)
        pieces = []
        if part.index not in self._by_index:
            pieces.append(new_call(self.calls, name or "", part.id))
            self._by_index[part.index] = self.calls[-1]
            self._ends_with_call = True
        if arguments:
            pieces.append(more_arguments(self._by_index[part.index], arguments))
        return pieces

    def _generation(self, calls: tuple[Call, ...]) -> ServerGeneration:
        assert self.finish_reason is not None
        text, thoughts = ("".join(getattr(piece, kind) for piece in self.pieces) for kind in ("text", "thoughts"))
        gate = _extra(self._last, "gate")
        return ServerGeneration(
            text=text,
            token_ids=(),
            log_probs=(),
            prompt_tokens=self._usage.prompt_tokens if self._usage else 0,
            finish_reason=self.finish_reason,
            stats=_stats(gate or {}),
            thoughts=thoughts,
            calls=calls,
            num_tokens=self._usage.completion_tokens if self._usage else 0,
            model_name=self._last.model,
            gate=gate,
            token_reports=self._token_reports or None,
        )


def _extra(part: Any, name: str) -> Any:
    """Return a field that OpenAI's API does not have."""
    return (part.model_extra or {}).get(name)


def _as_in_chats(logprobs: Any) -> list[dict[str, Any]]:
    """Return the log-probabilities of a completion token by token, in the form that those of a chat have."""
    if logprobs is None:
        return []
    values, alternatives = logprobs.token_logprobs, logprobs.top_logprobs or [None] * len(logprobs.tokens)
    return [
        {**_token(text, value), "top_logprobs": [_token(*other) for other in (others or {}).items()]}
        for text, value, others in zip(logprobs.tokens, values, alternatives, strict=True)
    ]


def _token(text: str, log_prob: float) -> dict[str, Any]:
    """Return a token as chats report it; the bytes of a part of a character are not told."""
    return {"token": text, "bytes": None if "\ufffd" in text else list(text.encode()), "logprob": log_prob}


def _stats(gate: Mapping[str, int]) -> GateStats:
    known = {one.name for one in fields(GateStats)}
    return GateStats(**{name: count for name, count in gate.items() if name in known})
