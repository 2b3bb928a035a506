"""The tokens that complete what a reply must not have, in each state of its text; found once a state.

A token is refused if the text after it can't be kept free, whatever follows. Words are looked for in the vocabulary by
regular expressions; for patterns the tokens are grouped by what the pattern sees of them.
"""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from cachetools import LRUCache
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from mara_integrations.engine.patterns.automaton import PatternAutomaton, PatternState
from mara_integrations.engine.token_texts import TokenTexts, may_become_letter, read_bytes
from mara_integrations.engine.word_automaton import START, State, WordAutomaton
from mara_integrations.errors import ConfigError
from mara_integrations.rewards.rules import split_notations
from mara_integrations.rewards.words import ForbiddenWords, is_in_word

_UNREADABLE = "\ufffd"  # stands for bytes that are not a character
_MAX_IDS = 2_000_000  # in the masks that are kept for each set of words, and for each pattern
_MAX_QUIET = 32  # states in which no match has begun, whose outcomes are kept
_MAX_WORK = 100_000  # states of networks that are passed for one mask, of all patterns of a request; about .1 s
_FREE, _PENDING, _REFUSED = 0, 1, 2  # a pending token leaves a match as the end of the text


class Refusals(ABC):
    """The tokens that complete some words or a pattern.

    Args:
        tokens: The vocabulary.
        eos_token_ids: Tokens that end a reply.

    Attributes:
        start: The state before any text.
    """

    start: Any

    def __init__(self, tokens: TokenTexts, eos_token_ids: Collection[int]) -> None:
        self._tokens = tokens
        self._eos_token_ids = frozenset(eos_token_ids)
        self._ids: LRUCache[tuple[Any, bytes, bool], Tensor] = LRUCache(_MAX_IDS, getsizeof=lambda ids: 1 + len(ids))
        self._lock = threading.Lock()

    @property
    def work(self) -> int:
        """The number of states that the networks of the patterns have passed so far; it measures their cost."""
        return 0

    @abstractmethod
    def read(self, state: Any, text: str) -> Any:
        """Return the state after more text; None: it can't be kept free any more."""

    @abstractmethod
    def is_pending(self, state: Any) -> bool:
        """Return whether a text that ended here would not be free, while one that goes on may be."""

    @abstractmethod
    def is_hopeless(self, state: Any, unfinished: bytes) -> bool:
        """Return whether no character that begins with these bytes keeps the text free."""

    @abstractmethod
    def _refused_after_text(self, state: Any, is_last: bool) -> set[int]:
        """Return ids of the tokens that are refused where no character is unfinished."""

    def after(self, state: Any, unfinished: bytes, token_id: int) -> tuple[Any, bytes] | None:
        """Return the state after a token, and the bytes of an unfinished character; None: it is refused."""
        if unfinished:
            text, rest = read_bytes(unfinished + self._tokens.data[token_id])
        else:
            text, rest = self._tokens.texts[token_id], self._tokens.unfinished[token_id]
        read = self.read(state, text)
        return None if read is None else (read, rest)

    def token_ids(self, state: Any, unfinished: bytes, *, is_last: bool) -> Tensor:
        """Return ids of the tokens that are refused, shape (R,); `is_last`: no token may follow them."""
        key = (state, unfinished, is_last)
        with self._lock:
            found: Tensor | None = self._ids.get(key)
            if found is None:
                found = torch.tensor(sorted(self._refused(*key)), dtype=torch.long)
                self._ids[key] = found
            return found

    def refuses(self, state: Any, unfinished: bytes, token_id: int, *, is_last: bool) -> bool:
        """Return whether a token is refused; see `token_ids`."""
        if token_id in self._eos_token_ids:
            return self._may_not_end(state, unfinished)
        read = self.after(state, unfinished, token_id)
        if read is None:
            return True
        after, rest = read  # of bytes that no free character begins with, what follows them could not be refused
        return (is_last and self._may_not_end(after, rest)) or (bool(rest) and self.is_hopeless(after, rest))

    def _may_not_end(self, state: Any, unfinished: bytes) -> bool:
        read = self.read(state, _UNREADABLE) if unfinished else state
        return read is None or self.is_pending(read)

    def _refused(self, state: Any, unfinished: bytes, is_last: bool) -> set[int]:
        if not unfinished:
            return self._refused_after_text(state, is_last)
        tried = {*self._tokens.within, *(i for i, data in enumerate(self._tokens.data) if not data)}
        broken = self.read(state, _UNREADABLE)  # by any token that does not go on with the character
        if broken is None:
            refused = {*range(len(self._tokens.data))} - tried
        else:
            refused = self._refused_after_text(broken, is_last) - tried
        return refused | {i for i in tried if self.refuses(state, unfinished, i, is_last=is_last)}


class WordRefusals(Refusals):
    """The tokens that complete words and phrases.

    Args:
        tokens: The vocabulary.
        words: The words.
        stop: Strings that end a reply and are cut off.
        eos_token_ids: Tokens that end a reply.
    """

    start = START

    def __init__(
        self, tokens: TokenTexts, words: ForbiddenWords, stop: Sequence[str], eos_token_ids: Collection[int]
    ) -> None:
        super().__init__(tokens, eos_token_ids)
        self._automaton = WordAutomaton(words, stop)
        self._edge = frozenset(i for i, first in tokens.first_folded() if not is_in_word(first))

    @override
    def read(self, state: State, text: str) -> State | None:
        return self._automaton.read(state, text)

    @override
    def is_pending(self, state: State) -> bool:
        return state.ends_word

    @override
    def is_hopeless(self, state: State, unfinished: bytes) -> bool:
        return state.ends_word and not may_become_letter(unfinished)

    @override
    def _refused_after_text(self, state: State, is_last: bool) -> set[int]:
        patterns, of_stops = self._automaton.may_complete(state, at_end=False)
        if is_last:
            patterns = [*patterns, *self._automaton.may_complete(state, at_end=True)[0]]
        plain = re.compile("|".join(of_stops)) if of_stops else None
        tried = self._tokens.matching(re.compile("|".join(patterns)), plain)
        tried |= set(self._tokens.open)
        refused = set(self._edge) if state.ends_word else set()
        return refused | {i for i in tried - refused if self.refuses(state, b"", i, is_last=is_last)}


class PatternRefusals(Refusals):
    """The tokens that complete a match of a pattern, or of a ready rule.

    Args:
        tokens: The vocabulary.
        notation: `re:PATTERN` or `rule:NAME`.
        stop: Strings that end a reply and are cut off.
        eos_token_ids: Tokens that end a reply.

    Raises:
        ConfigError: See `PatternAutomaton`.
    """

    def __init__(self, tokens: TokenTexts, notation: str, stop: Sequence[str], eos_token_ids: Collection[int]) -> None:
        super().__init__(tokens, eos_token_ids)
        self._notation = notation
        self._automaton = PatternAutomaton(notation, stop, tokens.characters)
        self.start = self._automaton.start
        symbols = [self._automaton.symbols(text) for text in tokens.texts]
        self._groups = sorted(set(symbols))  # tokens that the pattern does not tell apart
        numbers = {group: number for number, group in enumerate(self._groups)}
        self._group_of = np.array([numbers[text] for text in symbols])
        self._shared = [0, *map(_num_shared, self._groups, self._groups[1:])]
        self._open = np.array(tokens.open, dtype=np.int64)
        self._by_first = Counter(group[0] for group in self._groups if group)  # in the order of the groups
        self._quiet: LRUCache[PatternState, NDArray[np.uint8]] = LRUCache(_MAX_QUIET)
        for rest in {*tokens.unfinished} - {b""}:  # here, and not while replies are decoded
            self._automaton.symbols_that_begin(rest)

    @property
    @override
    def work(self) -> int:
        return self._automaton.work

    @override
    def read(self, state: PatternState, text: str) -> PatternState | None:
        return self._automaton.read(state, text)

    @override
    def is_pending(self, state: PatternState) -> bool:
        return self._automaton.ends(state)

    @override
    def is_hopeless(self, state: PatternState, unfinished: bytes) -> bool:
        return self._automaton.is_hopeless(state, unfinished)

    @override
    def _refused_after_text(self, state: PatternState, is_last: bool) -> set[int]:
        of_groups = self._outcomes(state) >= (_PENDING if is_last else _REFUSED)
        refused = of_groups[self._group_of]
        refused[self._open] = [self.refuses(state, b"", i, is_last=is_last) for i in self._tokens.open]
        return set(refused.nonzero()[0].tolist())

    def _outcomes(self, state: PatternState) -> NDArray[np.uint8]:
        """Return the outcome of each group of tokens.

        Most first characters undo whatever has begun: what follows them is the same in every state.
        """
        quiet, before = self._automaton.quiet(state), self._automaton.work
        known: NDArray[np.uint8] | None = self._quiet.get(quiet)
        if known is None:
            known = np.zeros(len(self._groups), np.uint8)
            self._follow(quiet, 0, len(self._groups), 0, known, before)
            self._quiet[quiet] = known
        if state == quiet:
            return known
        outcomes, start = known.copy(), len(self._groups) - self._by_first.total()
        for first, count in self._by_first.items():
            after = self._automaton.step(state, first)
            if after is None:
                outcomes[start : start + count] = _REFUSED
            elif after != self._automaton.step(quiet, first):
                self._follow(after, start, start + count, 1, outcomes, before)
            start += count
        return outcomes

    def _follow(
        self, state: PatternState, start: int, end: int, depth: int, outcomes: NDArray[np.uint8], before: int
    ) -> None:
        """Write the outcomes of the groups from `start` to `end`, given the state after their first `depth` symbols.

        Raises:
            ConfigError: If the pattern takes too long; `before` is the work done before this mask.
        """
        states: list[PatternState | None] = [state]  # after each beginning of the group at hand
        for number in range(start, end):
            group = self._groups[number]
            del states[1 + (max(self._shared[number] - depth, 0) if number > start else 0) :]
            for symbol in group[depth + len(states) - 1 :]:
                reached = states[-1]
                states.append(None if reached is None else self._automaton.step(reached, symbol))
            last = states[-1]
            outcomes[number] = _REFUSED if last is None else _PENDING if self._automaton.ends(last) else _FREE
            if self._automaton.work - before > _MAX_WORK:
                raise _takes_too_long(f"never={self._notation!r} takes")


def _takes_too_long(what: str) -> ConfigError:
    return ConfigError(
        f"{what} too long at this place of a reply: there are too many ways to match",
        hint="bound repetitions more tightly, or leave them unbounded",
    )


def _num_shared(one: str, other: str) -> int:
    """Return how many characters two strings begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class JointRefusals(Refusals):
    """The tokens that any of several refuse; a state has one of each.

    Args:
        tokens: The vocabulary.
        parts: The refusals, at least one.
        eos_token_ids: Tokens that end a reply.
    """

    def __init__(self, tokens: TokenTexts, parts: Sequence[Refusals], eos_token_ids: Collection[int]) -> None:
        super().__init__(tokens, eos_token_ids)
        self._parts = tuple(parts)
        self.start = tuple(part.start for part in parts)

    @property
    @override
    def work(self) -> int:
        return sum(part.work for part in self._parts)

    @override
    def read(self, state: tuple[Any, ...], text: str) -> tuple[Any, ...] | None:
        after = []
        for part, one in zip(self._parts, state, strict=True):
            after.append(part.read(one, text))
            if after[-1] is None:
                return None
        return tuple(after)

    @override
    def is_pending(self, state: tuple[Any, ...]) -> bool:
        return any(part.is_pending(one) for part, one in zip(self._parts, state, strict=True))

    @override
    def is_hopeless(self, state: tuple[Any, ...], unfinished: bytes) -> bool:
        return any(part.is_hopeless(one, unfinished) for part, one in zip(self._parts, state, strict=True))

    @override
    def token_ids(self, state: tuple[Any, ...], unfinished: bytes, *, is_last: bool) -> Tensor:
        before, found = self.work, list[Tensor]()
        for part, one in zip(self._parts, state, strict=True):
            found.append(part.token_ids(one, unfinished, is_last=is_last))
            if self.work - before > _MAX_WORK:
                raise _takes_too_long(f"never with {len(self._parts)} patterns takes")
        return torch.cat(found)

    @override
    def _refused_after_text(self, state: tuple[Any, ...], is_last: bool) -> set[int]:
        return set(self.token_ids(state, b"", is_last=is_last).tolist())


def refusals_of(
    tokens: TokenTexts, never: Sequence[str], stop: Sequence[str], eos_token_ids: Collection[int]
) -> Refusals:
    """Return what keeps words, phrases and patterns out of replies; each of them is made once a vocabulary.

    Args:
        tokens: The vocabulary.
        never: The words, phrases, `re:PATTERN` and `rule:NAME`, at least one.
        stop: Strings that end a reply and are cut off.
        eos_token_ids: Tokens that end a reply.

    Raises:
        ConfigError: If a pattern or rule is none, or can't be followed while a reply is written.
    """
    words, notations = split_notations(never)
    rest = (tuple(stop), frozenset(eos_token_ids))
    parts = list[Refusals]()
    with tokens.lock:
        if words:
            rule = ForbiddenWords(words)
            parts.append(_kept(tokens, (rule.folded, *rest), partial(WordRefusals, tokens, rule, *rest)))
        for notation in dict.fromkeys(notations):
            parts.append(_kept(tokens, (notation, *rest), partial(PatternRefusals, tokens, notation, *rest)))
    return parts[0] if len(parts) == 1 else JointRefusals(tokens, parts, eos_token_ids)


def _kept(tokens: TokenTexts, key: Hashable, make: Callable[[], Refusals]) -> Refusals:
    found: Refusals | None = tokens.kept.get(key)
    if found is None:
        found = tokens.kept[key] = make()
    return found
