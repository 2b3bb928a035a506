"""What a regular expression is made of, once it can be followed from left to right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import regex


@dataclass(frozen=True)
class Characters:
    r"""A set of characters, in the notation of the package `regex`, which decides what is in it.

    Attributes:
        source: The notation, as `[a-z]` or `\w`.
        flags: Its flags, as `regex.IGNORECASE`.
    """

    source: str
    flags: int = 0

    def __contains__(self, character: str) -> bool:
        """Return whether a character is in the set."""
        if self._literal is not None:
            return character == self._literal
        return _compiled(self.source, self.flags).match(character) is not None

    def runs(self, text: str) -> Iterator[tuple[int, int]]:
        """Return where characters of the set stand in a text, as starts and ends."""
        return (found.span() for found in _compiled(f"(?:{self.source})+", self.flags).finditer(text))

    @cached_property
    def _literal(self) -> str | None:
        plain = self.source.removeprefix("\\")
        is_literal = len(self.source) == 1 or (len(self.source) == 2 and not plain.isalnum())
        return plain if is_literal and self.source != "." and not self.flags & regex.IGNORECASE else None


@lru_cache(maxsize=1024)
def _compiled(source: str, flags: int) -> Any:
    return regex.compile(source, flags)


ANY = Characters(".", regex.DOTALL)
NEWLINE = Characters("\n")


@dataclass(frozen=True)
class Read:
    """One character of a set."""

    characters: Characters


@dataclass(frozen=True)
class Beside:
    """No character: whether the next one, or the one before, is in a set. The text's edge is in none."""

    characters: Characters
    is_ahead: bool
    is_in: bool


@dataclass(frozen=True)
class Chain:
    """One after another."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Either:
    """Any of them."""

    branches: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """Several times the same; a possessive one, which gives nothing back, is made another before it is followed."""

    item: Node
    least: int
    most: int | None
    is_possessive: bool = False


@dataclass(frozen=True)
class Atomic:
    """A group that gives nothing back; made another before it is followed."""

    item: Node


@dataclass(frozen=True)
class Look:
    """A look ahead or back, of whatever length; made another before it is followed."""

    item: Node
    is_ahead: bool
    is_positive: bool


@dataclass(frozen=True)
class LineEnd:
    """The end of the text, or of its last line; made another before it is followed."""


@dataclass(frozen=True)
class Beyond:
    """What must follow a match, and is no part of it."""

    item: Node


Node: TypeAlias = Read | Beside | Chain | Either | Repeat | Atomic | Look | LineEnd | Beyond
END = Beside(ANY, is_ahead=True, is_in=False)
