"""Read a reply while it is written: its thoughts, its text and its tool calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mara_integrations.replies.calls import Call, CallReader, Piece
from mara_integrations.replies.reasoning import ThoughtSplitter


class ReplyReader(Protocol):
    """Splits one reply into thoughts, text and calls, in pieces of any size."""

    @property
    def calls(self) -> list[Call]:
        """The calls read so far."""
        ...

    def push(self, text: str, finish_reason: str | None = None) -> list[Piece]:
        """Read more text, and return what is now certain; `finish_reason` is None while the reply goes on."""
        ...


@dataclass(slots=True)
class TagReader:
    """Reads replies with thoughts and calls between tags; see `ReplyReader`.

    Attributes:
        splitter: Separates thoughts from the answer.
        parser: Separates calls from text; None where the request had no tools.
        must_call: Whether the request left the model no choice but to call a tool.
    """

    splitter: ThoughtSplitter
    parser: CallReader | None = None
    must_call: bool = False

    @property
    def calls(self) -> list[Call]:
        """The calls read so far."""
        return self.parser.calls if self.parser is not None else []

    def push(self, text: str, finish_reason: str | None = None) -> list[Piece]:
        """Read more text.

        Args:
            text: The text that was added.
            finish_reason: Why the reply ended, `stop` or `length`; None while it goes on. Under `length` the last call
                is not whole, even where its text looks so: it gets an `error`.

        Returns:
            What is now certain.
        """
        is_last = finish_reason is not None
        thoughts, answer = self.splitter.push(text, final=is_last)
        pieces = [Piece(thoughts=thoughts)] if thoughts else []
        if self.parser is None:
            return [*pieces, Piece(answer)] if answer else pieces
        pieces += self.parser.push(answer, final=is_last, is_cut=finish_reason == "length")
        if finish_reason == "length" and self.must_call and not self.calls:
            pieces = [piece for piece in pieces if not piece.text]  # it was to become a call
            pieces += self.parser.cut_before_call()
        return pieces
