"""Read replies of gpt-oss, whose thoughts, answer and calls are messages in channels of their own.

`<|channel|>analysis<|message|>thoughts<|end|><|start|>assistant<|channel|>final<|message|>answer`, or in place of the
answer `<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}`. A call ends with `<|call|>`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mara_integrations.replies.calls import CUT, Call, Piece, more_arguments, new_call
from mara_integrations.replies.reasoning import overlap

START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
TAGS = (START, CHANNEL, MESSAGE, END, "<|constrain|>")
CALL_END = "<|call|>"
_TO = re.compile(r"to=(?:functions\.)?([^\s<]+)")


@dataclass(slots=True)
class HarmonyReader:
    """Splits one reply into thoughts, text and calls, in pieces of any size; see `ReplyReader`.

    Attributes:
        must_call: Whether the request left the model no choice but to call a tool.
        calls: The calls found so far.
    """

    must_call: bool = False
    calls: list[Call] = field(default_factory=list)
    _part: Literal["begin", "header", "thoughts", "text", "call"] = field(default="begin", init=False)
    _held: str = field(default="", init=False)

    def push(self, text: str, finish_reason: str | None = None) -> list[Piece]:
        """Read more text; `finish_reason` tells why the reply ended, None while it goes on."""
        self._held += text
        is_last = finish_reason is not None
        pieces: list[Piece] = []
        while (new := self._step(is_last)) is not None:
            pieces += new
        if is_last and self._part == "call":
            self._end_call(finish_reason == "length")
        if finish_reason == "length" and self.must_call and not self.calls:
            pieces = [piece for piece in pieces if not piece.text]  # it was to become a call
            pieces.append(new_call(self.calls, ""))
            self.calls[-1].error = CUT
        return pieces

    def _step(self, final: bool) -> list[Piece] | None:
        if self._part == "begin":
            return self._begin(final)
        if self._part == "header":
            return self._header()
        ends = [place for mark in (END, CALL_END, START) if (place := self._held.find(mark)) >= 0]
        keep = 0 if final else max(overlap(self._held, mark) for mark in (END, CALL_END, START))
        end = min(ends, default=len(self._held) - keep)
        new, self._held = self._held[:end], self._held[end:]
        pieces = self._written(new)
        if ends:
            if self._part == "call":
                self._end_call(is_cut=False)
            mark = next((mark for mark in (END, CALL_END) if self._held.startswith(mark)), "")
            self._held, self._part = self._held.removeprefix(mark), "header"
            return pieces
        return pieces or None

    def _begin(self, final: bool) -> list[Piece] | None:
        """A reply that does not begin with a header is text."""
        begun = self._held.lstrip()
        beginnings = (START, CHANNEL, "to=")
        if not final and any(mark.startswith(begun) and mark != begun for mark in beginnings):
            return None
        self._part = "header" if begun.startswith(beginnings) else "text"
        return []

    def _header(self) -> list[Piece] | None:
        header, found, rest = self._held.partition(MESSAGE)
        if not found:
            return None
        self._held = rest
        if recipient := _TO.search(header):
            self._part = "call"
            return [new_call(self.calls, recipient[1])]
        self._part = "thoughts" if f"{CHANNEL}analysis" in header else "text"
        return []

    def _written(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._part == "call":
            return [more_arguments(self.calls[-1], text)]
        return [Piece(thoughts=text)] if self._part == "thoughts" else [Piece(text=text)]

    def _end_call(self, is_cut: bool) -> None:
        if is_cut:
            self.calls[-1].error = CUT
        elif self.calls[-1].parsed is None:
            self.calls[-1].error = "the arguments are not valid JSON"


def reply_format(calls: Sequence[tuple[str, Any]], answer: dict[str, Any] | None) -> dict[str, Any]:
    """Return the format of a reply as a structural tag of xgrammar has it.

    Args:
        calls: Names and schemas of the tools that it may call. A call has no end of its own: `<|call|>` ends the reply.
        answer: The format of an answer; None: it may not give one.
    """
    begins = (
        "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.{}<|constrain|>json<|message|>",
        " to=functions.{}<|channel|>commentary <|constrain|>json<|message|>",
        " to=functions.{}<|channel|>commentary json<|message|>",
    )
    last = [
        _sequence(_text(begin.format(name)), {"type": "json_schema", "json_schema": schema})
        for name, schema in calls
        for begin in begins
    ]
    if answer is not None:
        last.append(_sequence(_text(f"{CHANNEL}final{MESSAGE}"), answer))
    before = {
        "type": "tags_with_separator",
        "tags": [
            {"type": "tag", "begin": f"{CHANNEL}{channel}{MESSAGE}", "content": {"type": "any_text"}, "end": END}
            for channel in ("analysis", "commentary")
        ],
        "separator": f"{START}assistant",
        "at_least_one": True,
    }
    end: dict[str, Any] = {"type": "or", "elements": last}
    return {"type": "or", "elements": [end, _sequence(before, _text(f"{START}assistant"), end)]}


def _text(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def _sequence(*elements: dict[str, Any]) -> dict[str, Any]:
    return {"type": "sequence", "elements": list(elements)}
