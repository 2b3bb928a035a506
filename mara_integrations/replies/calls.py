"""Tool calls in a reply, and the base class of the readers that find them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

CUT = "max_tokens cut the reply before this call was whole: raise max_tokens"


@dataclass(slots=True)
class Call:
    """One call as it was written; with an `error`, `arguments` is what can't be read, and `name` may be empty."""

    index: int
    id: str
    name: str
    arguments: str = ""
    error: str | None = None

    @property
    def parsed(self) -> dict[str, Any] | None:
        """Return the arguments as an object; None while they are not whole, or where the call has an error."""
        return None if self.error else json_object(self.arguments)


@dataclass(slots=True)
class Piece:
    """The next part of a reply: text, thoughts, or arguments of a call."""

    text: str = ""
    thoughts: str = ""
    call: Call | None = None


@dataclass(slots=True)
class CallReader(ABC):
    """Separates calls from the text of one reply while both are written.

    Attributes:
        calls: The calls found so far.
    """

    calls: list[Call] = field(default_factory=list, init=False)
    _part: str = field(default="text", init=False)  # what is read now: text, or a part of a call
    _held: str = field(default="", init=False)  # what may still become a mark
    _ends_with_call: bool = field(default=False, init=False)

    def push(self, text: str, *, final: bool = False, is_cut: bool = False) -> list[Piece]:
        """Read more text.

        Args:
            text: The text that was added.
            final: Whether this is the last text, so that text held back is text after all.
            is_cut: Whether the reply was cut: a call that it ends with is not whole.
        """
        self._held += text
        pieces: list[Piece] = []
        while (new := self._step(final)) is not None:
            pieces += new
        if final and self._part == "arguments":
            self.calls[-1].error = "the reply ended inside the call"
        if is_cut and self._ends_with_call:
            self.calls[-1].error = CUT
        return pieces

    def cut_before_call(self) -> list[Piece]:
        """Report a call of which nothing was written before the reply was cut."""
        piece = new_call(self.calls, "")
        self.calls[-1].error = CUT
        return [piece]

    @abstractmethod
    def _step(self, final: bool) -> list[Piece] | None:
        """Read the next part of what is held; None: it needs more text."""


def new_call(calls: list[Call], name: str, call_id: str | None = None) -> Piece:
    """Add a call to those of a reply, and return its first piece."""
    calls.append(Call(len(calls), call_id or f"call_{uuid4().hex[:24]}", name))
    return Piece(call=replace(calls[-1]))


def more_arguments(call: Call, arguments: str) -> Piece:
    """Add to the arguments of a call, and return the piece that says so."""
    call.arguments += arguments
    return Piece(call=replace(call, arguments=arguments))


@dataclass(slots=True)
class JSONEnd:
    """Finds where a JSON object ends, over any number of pieces; a tag outside a string ends it too."""

    depth: int = 0
    is_over: bool = False
    _in_string: bool = False
    _escaped: bool = False

    def find(self, text: str) -> int:
        """Return the number of characters that belong to the object."""
        for place, character in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = not self._escaped and character == "\\"
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self.depth += 1
            elif character == "<":
                self.is_over = True
                return place
            elif character in "}]":
                self.depth -= 1
                if self.depth == 0:
                    self.is_over = True
                    return place + 1
        return len(text)


def json_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object that a text holds; None if it is not JSON, or not an object."""
    try:
        loaded = json.loads(text, strict=False)  # in free text a string may hold a raw tab
    except (ValueError, RecursionError):
        return None
    return loaded if isinstance(loaded, dict) else None
