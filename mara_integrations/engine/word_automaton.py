"""Read a reply character by character, and tell when a forbidden word is complete. Knows neither tokens nor a model.

The automaton of Aho and Corasick for whole words: its state is the set of words begun and how far, so that a character
costs as much as there are such words, whatever the length of the reply. A word is complete with the first character
that does not go on with it: "refund" may still become "refunds".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from mara_integrations.engine.stop_strings import BegunStops, StopStrings
from mara_integrations.rewards.words import (
    ForbiddenWords,
    folded_character,
    has_edges,
    is_in_word,
    without_asterisks,
    word_pattern,
)

_SPACE, _APOSTROPHES = " ", ("'", "\u2019")
_MAX_KNOWN_STEPS = 100_000


class State(NamedTuple):
    """The state of the text so far.

    Attributes:
        begun: Words begun, by number, and how many of their characters are read.
        after_letter: Whether the text ends inside a word, so that no other can begin.
        ends_word: Whether the text ends with a forbidden word, which a letter may still make another one.
        stops: Stop strings begun, and whether the text before each ends with a forbidden word.
    """

    begun: frozenset[tuple[int, int]] = frozenset()
    after_letter: bool = False
    ends_word: bool = False
    stops: BegunStops = frozenset()


START = State()


class WordAutomaton:
    """Finds forbidden words in a text that is read from left to right; agrees with `ForbiddenWords.violations`.

    Args:
        words: The words.
        stop: Strings that end the text where they begin.
    """

    def __init__(self, words: ForbiddenWords, stop: Sequence[str] = ()) -> None:
        self.words = tuple(without_asterisks(word)[0] for word in words.folded)
        self._stop = StopStrings(stop)
        self._edges = [has_edges(word) for word in words.folded]
        self._by_first: dict[str, list[int]] = {}
        for number, word in enumerate(self.words):
            for first in _APOSTROPHES if word[0] == "'" else (word[0],):
                self._by_first.setdefault(first, []).append(number)
        self._known: dict[tuple[State, str], State | None] = {}

    def read(self, state: State, text: str) -> State | None:
        """Return the state after more text; None: a forbidden word is complete in it."""
        after: State | None = state
        for character in text:
            assert after is not None
            key = (after, character)
            if key not in self._known:
                if len(self._known) >= _MAX_KNOWN_STEPS:
                    self._known.clear()
                self._known[key] = self._step(after, character)
            after = self._known[key]
            if after is None:
                return None
        return after

    def may_complete(self, state: State, *, at_end: bool) -> tuple[list[str], list[str]]:
        """Return patterns of what may complete a word: in folded text, and of stop strings, in plain text.

        Every text that completes a word has one of them in it; `at_end`: or leaves a word as its end. The beginning and
        end of a text are marked by NUL.
        """
        ends = "(?=\\0)" if at_end else ""
        rests = [f"\\0{self._rest(number, length)}" for number, length in sorted(state.begun)]
        patterns = [word_pattern(word) for word in self.words]
        texts = self._stop.texts
        stops = [f"\\0{re.escape(texts[n][length:])}" for n, length, after_word in state.stops if after_word]
        if state.ends_word:
            stops += [f"\\0{re.escape(stop)}" for stop in texts]
        return [f"{pattern}{ends}" for pattern in (*rests, *patterns)], stops

    def _rest(self, number: int, length: int) -> str:
        word = self.words[number]
        if word[length - 1] == _SPACE:  # there may be more of it
            return rf"\s*{word_pattern(word[length:])}"
        return word_pattern(word[length:])

    def _step(self, state: State, character: str) -> State | None:
        stops = self._stop.read(state.stops, character, ends=state.ends_word)
        if stops is None:
            return None
        after: State | None = state
        for folded in folded_character(character):
            assert after is not None
            after = self._step_folded(after, folded)
            if after is None:
                return None
        return after._replace(stops=stops) if after is not None else None

    def _step_folded(self, state: State, character: str) -> State | None:
        goes_on = is_in_word(character)
        if state.ends_word and not goes_on:
            return None
        read = set()
        for number, length in state.begun:
            word = self.words[number]
            if word[length - 1] == _SPACE and character.isspace():
                read.add((number, length))
            if _matches(word[length], character):
                read.add((number, length + 1))
        for number in self._by_first.get(character, ()):
            if not (state.after_letter and self._edges[number][0]):
                read.add((number, 1))
        complete = {number for number, length in read if length == len(self.words[number])}
        if any(not self._edges[number][1] for number in complete):
            return None
        begun = frozenset(part for part in read if part[1] < len(self.words[part[0]]))
        return State(begun, goes_on, bool(complete))


def _matches(wanted: str, character: str) -> bool:
    if wanted == _SPACE:
        return character.isspace()
    return character in _APOSTROPHES if wanted == "'" else character == wanted
