"""Characters by what they mean to some patterns: those that are alike there become one symbol."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from mara_integrations.engine.patterns.tree import Characters

_FIRST = 0x100  # the code of the first symbol


class Alphabet:
    """The symbols of a text.

    Args:
        sets: The sets that tell characters apart.
        single: Numbers of the sets whose characters are all told apart.
        common: The characters that a text usually has.

    Attributes:
        common: The symbols of those.
    """

    def __init__(self, sets: Sequence[Characters], single: Collection[int], common: Iterable[str]) -> None:
        self._sets = sets
        self._single = sum(1 << number for number in single)
        self._symbols: dict[tuple[int, str], str] = {}
        self._sets_of: dict[str, int] = {}
        self._characters: dict[str, str] = {}
        self._table = _Table(self)
        self.common = "".join(dict.fromkeys(self.read("".join(sorted(common)))))

    def read(self, text: str) -> str:
        """Return the symbols of a text, one for each character."""
        return text.translate(self._table)

    def symbols_of(self, text: str) -> frozenset[str]:
        """Return the different symbols of a long text; not each of its characters is looked at."""
        inside = np.zeros((len(self._sets), len(text)), dtype=bool)
        for number, one in enumerate(self._sets):
            for start, end in one.runs(text):
                inside[number, start:end] = True
        told_apart = [number for number in range(len(self._sets)) if self._single >> number & 1]
        _, alike = np.unique(inside, axis=1, return_index=True)
        places = {*alike.tolist(), *np.flatnonzero(inside[told_apart].any(axis=0)).tolist()}
        return frozenset(self.read("".join(text[place] for place in places)))

    def sets_of(self, symbol: str) -> int:
        """Return the mask of the sets that a symbol's characters are in."""
        return self._sets_of[symbol]

    def character(self, symbol: str) -> str:
        """Return a character of a symbol; the only one, if it is in a set of `single`."""
        return self._characters[symbol]

    def symbol(self, character: str) -> str:
        """Return the symbol of a character."""
        inside = sum(1 << number for number, one in enumerate(self._sets) if character in one)
        key = (inside, character if inside & self._single else "")
        if key not in self._symbols:
            symbol = chr(_FIRST + len(self._symbols))
            self._sets_of[symbol], self._characters[symbol] = inside, character
            self._symbols[key] = symbol
        return self._symbols[key]


class _Table(dict[int, str]):
    """The table that `str.translate` asks for each character."""

    def __init__(self, alphabet: Alphabet) -> None:
        self._alphabet = alphabet

    def __missing__(self, code: int) -> str:
        symbol = self._alphabet.symbol(chr(code))
        self[code] = symbol
        return symbol
