"""Read tool calls that are written between marks, as JSON after a header or as one tag for each argument."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from mara_integrations.messages import Tool
from mara_integrations.replies.calls import CallReader, JSONEnd, Piece, more_arguments, new_call
from mara_integrations.replies.reasoning import overlap
from mara_integrations.replies.schema_values import value_of


@dataclass(frozen=True, slots=True)
class CallMarks:
    """The marks of a family's calls.

    Attributes:
        begins: Marks that a call may begin with.
        header: Pattern of everything before the arguments, with the group `name`, and `id` if the header is the id.
        end: Mark that ends a call.
        around: Tags around calls.
        parameter: Pattern of one argument, with the groups `key` and `value`, and `is_text` if it has a type. None: the
            arguments are one JSON object.
    """

    begins: tuple[str, ...]
    header: re.Pattern[str]
    end: str
    around: tuple[str, ...] = ()
    parameter: re.Pattern[str] | None = None


@dataclass(slots=True)
class MarkedCallReader(CallReader):
    """Separates calls from text while both are written; text that may become a mark is held back until that is clear.

    JSON arguments are passed on as they are written, tagged ones when the call is whole. A call that can't be read has
    an `error`. White space before and between calls is dropped.

    Attributes:
        marks: Marks of the model's family.
        tools: The tools; their schemas tell which arguments are text.
    """

    marks: CallMarks
    tools: Sequence[Tool] = ()
    _json: JSONEnd = field(default_factory=JSONEnd, init=False)

    @override
    def _step(self, final: bool) -> list[Piece] | None:
        steps = {"text": self._text, "call": self._call, "arguments": self._arguments, "end": self._end}
        return steps[self._part](final)

    # One step of each part; None: it needs more text.

    def _text(self, final: bool) -> list[Piece] | None:
        marks = (*self.marks.begins, *self.marks.around)
        found = [(place, -len(mark), mark) for mark in marks if (place := self._held.find(mark)) >= 0]
        if not found:
            keep = max(overlap(self._held, mark) for mark in marks)
            certain = self._held[: len(self._held) - keep].rstrip()
            return self._give(len(self._held) if final else len(certain)) or None
        place, _, mark = min(found)
        before = self._give(place, before_mark=True)
        if mark in self.marks.around:
            self._held = self._held[len(mark) :]
        else:
            self._part = "call"
        return before

    def _call(self, final: bool) -> list[Piece] | None:
        header = self.marks.header.match(self._held)
        if header is None:
            return self._broken("", "the call has no name and arguments", final)
        if self.marks.parameter is not None:
            return self._tagged(header, self.marks.parameter, final)
        self._held, self._json, self._part = self._held[header.end() :], JSONEnd(), "arguments"
        return [self._open(header)]

    def _arguments(self, final: bool) -> list[Piece] | None:
        end = self._json.find(self._held)
        new, self._held = self._held[:end], self._held[end:]
        pieces = [more_arguments(self.calls[-1], new)] if new else None
        if self._json.is_over:
            self._part = "end"
            if self.calls[-1].parsed is None:
                self.calls[-1].error = "the arguments are not valid JSON"
            return pieces or []
        return pieces

    def _end(self, final: bool) -> list[Piece] | None:
        rest = self._held.lstrip("` \n")
        if not final and self.marks.end.startswith(rest) and rest != self.marks.end:
            return None
        self._held, self._part = rest.removeprefix(self.marks.end), "text"
        return []

    def _tagged(self, header: re.Match[str], parameter: re.Pattern[str], final: bool) -> list[Piece] | None:
        schema = next((tool.parameters for tool in self.tools if tool.name == header["name"]), {})
        place, arguments = header.end(), dict[str, Any]()
        while argument := parameter.match(self._held, place):
            given = argument.groupdict()
            is_text = None if given.get("is_text") is None else given["is_text"] == "true"
            arguments[given["key"]] = value_of(given["value"], schema, given["key"], is_text=is_text)
            place = argument.end()
        rest = self._held[place:].lstrip()
        if not rest.startswith(self.marks.end):
            return self._broken(header["name"], "the arguments can't be read", final)
        self._held, self._part = rest.removeprefix(self.marks.end), "text"
        opened = self._open(header)
        return [opened, more_arguments(self.calls[-1], json.dumps(arguments, ensure_ascii=False))]

    def _broken(self, name: str, error: str, final: bool) -> list[Piece] | None:
        """Wait for the rest of a call; where there is none, report the call as it is, or give it as text."""
        end = self._held.find(self.marks.end)
        if end < 0 and not final:
            return None
        self._part = "text"
        if end < 0 and not name:
            return self._give(len(self._held))
        body, self._held = self._held[: end if end >= 0 else None], self._held[end:] if end >= 0 else ""
        self._held = self._held.removeprefix(self.marks.end)
        begin = next(begin for begin in self.marks.begins if body.startswith(begin))
        opened = new_call(self.calls, name)
        self._ends_with_call = True
        self.calls[-1].error = error if end >= 0 else "the reply ended inside the call"
        return [opened, more_arguments(self.calls[-1], body.removeprefix(begin))]

    def _open(self, header: re.Match[str]) -> Piece:
        self._ends_with_call = True
        return new_call(self.calls, header["name"].strip(), header.groupdict().get("id"))

    def _give(self, end: int, *, before_mark: bool = False) -> list[Piece]:
        text, self._held = self._held[:end], self._held[end:]
        if before_mark:
            text = text.rstrip()
        if self.calls and self._ends_with_call:
            text = text.lstrip()
        self._ends_with_call = self._ends_with_call and not text
        return [Piece(text=text)] if text else []
