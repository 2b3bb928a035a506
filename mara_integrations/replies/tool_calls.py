"""Read tool calls that are written as JSON objects out of a reply, token by token."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field

from typing_extensions import override

from mara_integrations.replies.calls import CallReader, JSONEnd, Piece, json_object, more_arguments, new_call


@dataclass(frozen=True, slots=True)
class JSONMarks:
    """The marks of a family whose calls are JSON objects.

    Attributes:
        marks: Marks that begin a call; models are less exact than grammars, so there may be several. One that begins
            with a bracket is JSON itself, and white space between its parts does not matter.
        close: Mark that ends a call which a tag began.
    """

    marks: tuple[str, ...]
    close: str = ""


# How a model writes calls that was shown tools and forgot the tags.
BARE_CALL = '{"name":'


_OPENED = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


_OPENED_V11 = re.compile(r"([\w.-]+)(?:\[CALL_ID\][\w-]*)?\[ARGS\]\s*(?=\{)")  # Mistral's newer form
_NAME = re.compile(r'"name"\s*:\s*"([^"\\]+)"')


@dataclass(slots=True)
class CallParser(CallReader):
    """Separates calls from text while both are written; text that may become a call is held back until that is clear.

    JSON that a tag announces, or that names one of the tools, is a call; it has an `error` if it can't be read. Other
    JSON is text.

    Attributes:
        syntax: Marks of the model's family.
        names: Names of the tools; with them, a reply that is a call without its tag is understood too.
    """

    syntax: JSONMarks
    names: Collection[str] = ()
    _mark: str = field(default="", init=False)  # what began this call, as it was written
    _is_tagged: bool = field(default=False, init=False)
    _in_list: bool = field(default=False, init=False)
    _in_object: bool = field(default=False, init=False)
    _is_first: bool = field(default=True, init=False)  # no text was given yet
    _json: JSONEnd = field(default_factory=JSONEnd, init=False)

    @override
    def _step(self, final: bool) -> list[Piece] | None:
        steps = {"text": self._text, "head": self._head, "arguments": self._arguments}
        steps.update(rest=self._rest, end=self._end)
        return steps[self._part](final)

    # One step of each part; None: it needs more text.

    def _text(self, final: bool) -> list[Piece] | None:
        if self.calls:  # white space between calls and after the last is dropped
            self._held = self._held.lstrip()
        for place in range(len(self._held)):
            is_begin = self._is_first and not self._held[:place].strip()
            for mark in (*self.syntax.marks, *((BARE_CALL,) if self.names and is_begin else ())):
                end = _match(self._held, place, mark)
                if end is None and not final:
                    return self._give(place) or None
                if end:
                    return [*self._give(place), *self._begin(mark, end - place)]
        return self._give(len(self._held)) or None

    def _begin(self, mark: str, length: int) -> list[Piece]:
        self._in_list = mark.startswith("[{")
        self._is_tagged = not self._in_list and not mark.startswith("{")
        length = length if self._is_tagged else int(self._in_list)
        self._mark, self._held, self._part = self._held[:length], self._held[length:], "head"
        return []

    def _head(self, final: bool) -> list[Piece] | None:
        self._skip(r"\s*\[?\s*" if self._is_tagged and not self.syntax.close and not self._in_list else r"\s*")
        self._in_list = self._in_list or (self._is_tagged and "[" in self._mark[1:])
        header = _OPENED.match(self._held)
        self._in_object = header is not None
        if header is None and self._is_tagged:
            header = _OPENED_V11.match(self._held)
        if header is not None and self._may_be(header[1]):
            self._held, self._json, self._part = self._held[header.end() :], JSONEnd(), "arguments"
            return [self._open(header[1])]
        end = self._end_of_body()
        if end is None and not final:
            return None
        body, self._held = self._held[:end], self._held[len(self._held) if end is None else end :]
        self._part = "end"
        call, name = _call_of(body, self._is_tagged), _NAME.search(body)
        if call is not None and self._may_be(call[0]):
            return [self._open(call[0]), self._add(call[1])]
        is_meant = end is not None or body.startswith("{") if self._is_tagged else name and name[1] in self.names
        if is_meant:
            opened, rest = self._open(name[1] if name else ""), self._add(body)
            self.calls[-1].error = "the reply ended inside the call" if end is None else "the call is not valid JSON"
            return [opened, rest]
        self._held, self._part = f"{self._mark}{body}{self._held}", "text"
        return self._give(len(self._mark) + len(body))

    def _arguments(self, final: bool) -> list[Piece] | None:
        end = self._json.find(self._held)
        new, self._held = self._held[:end], self._held[end:]
        pieces = [self._add(new)] if new else None
        if self._json.is_over:
            self._part = "rest" if self._in_object else "end"
            if self.calls[-1].parsed is None:
                self.calls[-1].error = "the arguments are not valid JSON"
            self._json = JSONEnd(depth=1)
        return pieces

    def _rest(self, final: bool) -> list[Piece] | None:
        self._held = self._held[self._json.find(self._held) :]
        if not self._json.is_over:
            return None
        self._part = "end"
        return []

    def _end(self, final: bool) -> list[Piece] | None:
        self._held, close = self._held.lstrip(), self.syntax.close if self._is_tagged else ""
        if not self._held:
            return None
        if self._in_list and self._held[0] in ",]":
            self._in_list = self._held[0] == ","
            self._mark, self._held, self._part = "", self._held[1:], "head" if self._in_list else "end"
        elif close and close.startswith(self._held) and close != self._held:
            if not final:
                return None
            self._held, self._part = "", "text"
        else:
            self._held, self._part = self._held.removeprefix(close).removeprefix(";"), "text"
        return []

    def _end_of_body(self) -> int | None:
        if self._held.startswith("{"):
            json_end = JSONEnd()
            end = json_end.find(self._held)
            return end if json_end.is_over else None
        end = self._held.find(self.syntax.close) if self.syntax.close else -1
        return end if end >= 0 else None

    def _may_be(self, name: str) -> bool:
        return self._is_tagged or not self.names or name in self.names

    def _skip(self, pattern: str) -> None:
        """Move the match into `_mark`, so that it is returned as text if this is not a call after all."""
        matched = re.match(pattern, self._held)
        assert matched is not None
        self._mark, self._held = self._mark + matched[0], self._held[matched.end() :]

    def _open(self, name: str) -> Piece:
        self._ends_with_call = True
        return new_call(self.calls, name)

    def _add(self, arguments: str) -> Piece:
        return more_arguments(self.calls[-1], arguments)

    def _give(self, end: int) -> list[Piece]:
        text, self._held = self._held[:end], self._held[end:]
        self._is_first = self._is_first and not text.strip()
        self._ends_with_call = self._ends_with_call and not text.strip()
        return [Piece(text=text)] if text else []


def _match(text: str, place: int, mark: str) -> int | None:
    """Return where the mark ends that begins at `place`; 0: none begins there. None: the text ends inside it."""
    end = place
    for character in mark:
        while place < end < len(text) and character in '{":' and text[end].isspace():  # as JSON allows
            end += 1
        if end == len(text):
            return None
        if text[end] != character:
            return 0
        end += 1
    return end


def _call_of(body: str, is_tagged: bool) -> tuple[str, str] | None:
    """Return the name and arguments of a call whose JSON has another order or form than usual."""
    call = json_object(body) or {}
    call = call["function"] if isinstance(call.get("function"), dict) else call
    arguments = call.get("arguments", call.get("parameters", {} if is_tagged else None))
    if isinstance(arguments, str):
        arguments = json_object(arguments)
    if not isinstance(call.get("name"), str) or not call["name"] or not isinstance(arguments, dict):
        return None
    return call["name"], json.dumps(arguments, ensure_ascii=False)
