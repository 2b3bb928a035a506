"""Separate the thoughts of a reasoning model, `<think>...</think>` at the beginning of a reply, from its answer.

Knows text alone, in pieces of any size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

OPEN, CLOSE = "<think>", "</think>"
# How a reply begins: without thoughts, perhaps with an OPEN of its own, or after an OPEN in the prompt
Thoughts = Literal["none", "possible", "begun"]


@dataclass(slots=True)
class ThoughtSplitter:
    """Splits a reply while it is written; text that may become a tag is held back until that is clear.

    Attributes:
        is_open: The prompt ended inside an open `<think>`, so the reply begins with thoughts.
    """

    is_open: bool = False
    _part: Literal["start", "thoughts", "answer"] = field(default="start", init=False)
    _at_tag: bool = field(default=False, init=False)  # white space after a tag belongs to the tag
    _held: str = field(default="", init=False)

    def push(self, text: str, *, final: bool = False) -> tuple[str, str]:
        """Read more text; `final` says that it is the last.

        Returns:
            The new part of the thoughts, and of the answer; both may be empty.
        """
        self._held += text
        if self._part == "start":
            self._begin(final)
        thoughts = self._thoughts(final) if self._part == "thoughts" else ""
        return thoughts, self._answer() if self._part == "answer" else ""

    def _begin(self, final: bool) -> None:
        begun = self._held.lstrip()
        if begun.startswith(OPEN):  # some write it although the prompt has it already
            self._part, self._at_tag, self._held = "thoughts", True, begun[len(OPEN) :]
        elif final or not OPEN.startswith(begun):
            self._part, self._at_tag = ("thoughts", True) if self.is_open else ("answer", False)

    def _thoughts(self, final: bool) -> str:
        held = self._held.lstrip() if self._at_tag else self._held
        end = held.find(CLOSE)
        if end >= 0:
            thoughts, self._held = held[:end].rstrip(), held[end + len(CLOSE) :]
            self._part, self._at_tag = "answer", True
            return thoughts
        thoughts = held[: len(held) - (0 if final else overlap(held, CLOSE))].rstrip()
        self._held = "" if final else held[len(thoughts) :]
        self._at_tag = self._at_tag and not thoughts
        return thoughts

    def _answer(self) -> str:
        answer, self._held = self._held.lstrip() if self._at_tag else self._held, ""
        self._at_tag = self._at_tag and not answer
        return answer


def overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `mark`, but not all of it."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
