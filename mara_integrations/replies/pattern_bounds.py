"""Bounds of a regular expression: the lengths of its texts, and its size with its repetitions written out."""

from __future__ import annotations

import re
from dataclasses import dataclass

_QUANTIFIER = re.compile(r"(?:([*+?])|\{(\d{1,9})(?:(,)(\d{0,9}))?\})[?+]?")
_GROUP = re.compile(r"\?(?:[:=!>]|<[=!]|P?<\w*>)")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]?", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:[pPukx]\{[^}]*\}|.)?", re.DOTALL)


@dataclass(slots=True)
class _Group:
    """A group that is being read: the alternatives before its last `|`, and the one since then.

    Attributes:
        shortest: Characters of the shortest alternative so far; None before the first `|`.
        size: Characters of all alternatives so far.
        part_shortest: Characters of the alternative that is being read, but for its last part.
        part_size: Its size, but for its last part.
        last: Both of the last part, which a quantifier may repeat.
    """

    shortest: int | None = None
    size: int = 0
    part_shortest: int = 0
    part_size: int = 0
    last: tuple[int, int] = (0, 0)

    def add(self, shortest: int, size: int) -> None:
        """Begin a new last part."""
        self.part_shortest, self.part_size = self.part_shortest + self.last[0], self.part_size + self.last[1]
        self.last = shortest, size

    def close_alternative(self) -> tuple[int, int]:
        """End the alternative; returns both numbers of the group so far."""
        self.add(0, 0)
        self.shortest = self.part_shortest if self.shortest is None else min(self.shortest, self.part_shortest)
        self.size += self.part_size
        self.part_shortest = self.part_size = 0
        return self.shortest, self.size


def pattern_bounds(pattern: str) -> tuple[int, int]:
    """Measure a regular expression, in time that grows with its length alone.

    Returns:
        Characters of its shortest text, and characters and classes of the pattern with its repetitions written out.
        A pattern that is malformed gets some numbers: whoever compiles it refuses it.
    """
    groups, place = [_Group()], 0
    while place < len(pattern):
        character = pattern[place]
        found: re.Match[str] | None = None
        if character in "*+?{" and (found := _QUANTIFIER.match(pattern, place)) is not None:
            groups[-1].last = _repeated(groups[-1].last, found)
        elif character == "(":
            groups.append(_Group())
            found = _GROUP.match(pattern, place + 1)
        elif character == ")" and len(groups) > 1:
            numbers = groups.pop().close_alternative()
            groups[-1].add(*numbers)
        elif character == "|":
            groups[-1].close_alternative()
        elif character in "^$":
            groups[-1].add(0, 0)
        else:
            found = {"[": _CLASS, "\\": _ESCAPE}.get(character, _ANY).match(pattern, place)
            groups[-1].add(1, 1)
        place = max(place + 1, found.end() if found is not None else 0)
    while len(groups) > 1:
        numbers = groups.pop().close_alternative()
        groups[-1].add(*numbers)
    return groups[0].close_alternative()


_ANY = re.compile(".", re.DOTALL)


def _repeated(part: tuple[int, int], quantifier: re.Match[str]) -> tuple[int, int]:
    sign, least, comma, most = quantifier.groups()
    if sign is not None:
        return (part[0] if sign == "+" else 0), part[1]
    times = max(int(least), int(most) if comma and most else 0, 1)
    return part[0] * int(least), part[1] * times
