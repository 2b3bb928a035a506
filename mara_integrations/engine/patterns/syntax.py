"""Read a regular expression of the package `regex`, as far as a reply can be followed by it, character by character.

What it can't follow exactly is refused by name: back references, recursion, look-around of more than a character.
Which characters a set has is left to `regex` itself.
"""

from __future__ import annotations

import re

import regex

from mara_integrations.engine.patterns.tree import (
    ANY,
    END,
    Atomic,
    Beside,
    Chain,
    Characters,
    Either,
    LineEnd,
    Look,
    Node,
    Read,
    Repeat,
)
from mara_integrations.errors import ConfigError

_MAX_DEPTH = 30  # groups within groups
_KNOWN_FLAGS = {
    "i": regex.IGNORECASE,
    "m": regex.MULTILINE,
    "s": regex.DOTALL,
    "x": regex.VERBOSE,
    "a": regex.ASCII,
    "u": regex.UNICODE,
}
_KEPT = regex.IGNORECASE | regex.ASCII  # what bears on a set of characters
_UNKNOWN_FLAGS = regex.FULLCASE | regex.LOCALE | regex.REVERSE | regex.VERSION1 | regex.WORD | regex.POSIX
_SET = re.compile(r"\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]", re.DOTALL)
_ESCAPE = re.compile(
    r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^}]*\}|[pP]\{[^}]*\}|[pP]\w|[dDwWsShntrfv]|[^\w\s]|\s|_)"
)
_COUNT = re.compile(r"([*+?]|\{(?=[\d,])(\d*)(,?)(\d*)\})([+?]?)")
_GROUP = re.compile(r"\((?:\?(?:P?<[^\W\d]\w*>|(?P<look><?[=!])|(?P<atomic>>)|(?P<flags>[a-zA-Z]*(?:-[a-zA-Z]+)?):))?")
_COMMENT = re.compile(r"\(\?#[^)]*\)")
_LEADING_FLAGS = re.compile(r"\(\?([a-zA-Z]+)\)")
_SPACE = re.compile(r"(?:\s|#[^\n]*)+")
_WORD = r"\w"


def parse(pattern: str, flags: int, shown: str) -> Node:
    """Return the tree of a valid regular expression.

    Args:
        pattern: The regular expression.
        flags: Its flags.
        shown: What messages call it.

    Raises:
        ConfigError: If it has what can't be followed from left to right; names it.
    """
    return _Reader(pattern, shown).whole(flags)


def refused(shown: str, what: str, hint: str | None = None) -> ConfigError:
    """Return the error for a pattern that can't be kept out of a reply."""
    return ConfigError(
        f"never={shown!r} can't be kept while a reply is written: it has {what}",
        hint=hint or "train a head with --forbid instead",
    )


class _Reader:
    def __init__(self, pattern: str, shown: str) -> None:
        self._pattern, self._shown = pattern, shown
        self._at = self._depth = 0

    def whole(self, flags: int) -> Node:
        if flags & _UNKNOWN_FLAGS:
            raise refused(self._shown, "other flags than i, m, s, x, a and u")
        while found := _LEADING_FLAGS.match(self._pattern, self._at):
            flags, self._at = self._with_flags(flags, found[1]), found.end()
        return self._alternatives(flags)

    def _alternatives(self, flags: int) -> Node:
        branches = [self._chain(flags)]
        while self._next() == "|":
            self._at += 1
            branches.append(self._chain(flags))
        return branches[0] if len(branches) == 1 else Either(tuple(branches))

    def _chain(self, flags: int) -> Node:
        parts = list[Node]()
        while True:
            self._skip(flags)
            if self._next() in ("", "|", ")"):
                return parts[0] if len(parts) == 1 else Chain(tuple(parts))
            parts.append(self._repeated(self._part(flags), flags))

    def _skip(self, flags: int) -> None:
        skipped = (_COMMENT, _SPACE) if flags & regex.VERBOSE else (_COMMENT,)
        while found := next((m for kind in skipped if (m := kind.match(self._pattern, self._at))), None):
            self._at = found.end()

    def _next(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _take(self, kind: re.Pattern[str]) -> re.Match[str] | None:
        found = kind.match(self._pattern, self._at)
        if found:
            self._at = found.end()
        return found

    def _repeated(self, item: Node, flags: int) -> Node:
        self._skip(flags)
        found = self._take(_COUNT)
        if found is None:
            return item
        sign, least, comma, most, suffix = found.groups()
        if sign in "*+?":
            bounds = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        else:
            bounds = int(least or 0), int(most) if most else None if comma else int(least)
        return Repeat(item, *bounds, is_possessive=suffix == "+")

    def _part(self, flags: int) -> Node:
        sign = self._next()
        if sign == "(":
            return self._group(flags)
        if sign in "[\\":
            return self._set(flags)
        if sign in "{*+?":
            what = f"{self._pattern[self._at :][:12]!r}"
            raise refused(self._shown, what, hint=f"for the character write \\{sign}")
        self._at += 1
        if sign == "^":
            return Beside(Characters("[^\n]") if flags & regex.MULTILINE else ANY, is_ahead=False, is_in=False)
        if sign == "$":
            return Beside(Characters("[^\n]"), is_ahead=True, is_in=False) if flags & regex.MULTILINE else LineEnd()
        if sign == ".":
            return Read(ANY if flags & regex.DOTALL else Characters("[^\n]"))
        return Read(Characters(regex.escape(sign), flags & _KEPT if sign.lower() != sign.upper() else 0))

    def _set(self, flags: int) -> Node:
        if found := self._take(_SET) or self._take(_ESCAPE):
            return Read(Characters(found[0], flags & _KEPT))
        name = self._pattern[self._at + 1 : self._at + 2]
        self._at += 2
        word = Characters(_WORD, flags & _KEPT)
        if name in "bB":
            return _boundary(word, is_edge=name == "b")
        if name == "A":
            return Beside(ANY, is_ahead=False, is_in=False)
        if name in "Zz":
            return END
        if name.isdigit() or name in "gk":
            raise refused(self._shown, f"a back reference, \\{name}")
        raise refused(self._shown, f"\\{name}", hint=r"write characters as \x41, \u0041 or \N{NAME}")

    def _group(self, flags: int) -> Node:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise refused(self._shown, f"more than {_MAX_DEPTH} groups within groups")
        begins = self._pattern[self._at : self._at + 4]
        found = self._take(_GROUP)
        if found is None or self._next() in "?*":
            what = {"(?P=": "a back reference", "(?P>": "recursion"}.get(begins, "a group of another kind")
            raise refused(self._shown, f"{what}, {begins!r}")
        item = self._alternatives(self._with_flags(flags, found["flags"] or ""))
        self._at += 1
        self._depth -= 1
        if found["atomic"]:
            return Atomic(item)
        if look := found["look"]:
            return Look(item, is_ahead="<" not in look, is_positive="=" in look)
        return item

    def _with_flags(self, flags: int, letters: str) -> int:
        for letter in letters.replace("-", ""):
            if letter not in _KNOWN_FLAGS:
                raise refused(self._shown, f"the flag {letter!r}", hint="flags are i, m, s, x, a and u")
        switched_on, _, switched_off = letters.partition("-")
        for letter in switched_on:
            flags |= _KNOWN_FLAGS[letter]
        for letter in switched_off:
            flags &= ~_KNOWN_FLAGS[letter]
        return flags


def _boundary(word: Characters, *, is_edge: bool) -> Node:
    before, after = (
        {is_in: Beside(word, is_ahead=is_ahead, is_in=is_in) for is_in in (True, False)} for is_ahead in (False, True)
    )
    return Either(tuple(Chain((before[is_in], after[is_in != is_edge])) for is_in in (True, False)))
