r"""Read a reply character by character, and tell when it can no longer be kept free of a pattern. Knows no model.

A match is complete as soon as no text that follows could undo it: that of `ab` with its "b", that of `\bab\b` with
the first character that is not a letter, or with the end of the reply. Deterministic states are made when a text
needs them.

A rule with a check, as Luhn's formula, follows the text of each match that has begun. A number is then read in every
way that its pattern allows, while `find_cards` reads it in one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import regex
from cachetools import LRUCache

from mara_integrations.engine.patterns.alphabet import Alphabet
from mara_integrations.engine.patterns.network import Network
from mara_integrations.engine.patterns.simplify import simplified
from mara_integrations.engine.patterns.syntax import parse
from mara_integrations.engine.patterns.tree import Characters
from mara_integrations.engine.stop_strings import BegunStops, StopStrings
from mara_integrations.engine.token_texts import possible_codes
from mara_integrations.errors import ConfigError, RewardError
from mara_integrations.rewards.rules import rule_patterns, split_notations

MAX_PATTERNS = 16  # of a request
_MAX_KNOWN = 300_000  # states of the network, in all deterministic ones that are kept
_MAX_AHEAD = 20_000  # states of the network, in what is looked at ahead of one text
_EVERY = 64  # of very many characters that may follow, one in so many is looked at
_MANY = 4096


class Core(NamedTuple):
    """The matches that have begun.

    Attributes:
        begun: Their states in the network, and the text of those that have a check.
        looks: The looks back that hold here.
    """

    begun: frozenset[tuple[int, str]]
    looks: int


class PatternState(NamedTuple):
    """The state of the text so far: matches begun, and stop strings begun."""

    core: Core
    stops: BegunStops = frozenset()


def check_patterns(never: Sequence[str]) -> None:
    """Check the patterns among what a reply must not have.

    Raises:
        ConfigError: If there are too many; see `network_of`.
    """
    notations = split_notations(never)[1]
    if len(notations) > MAX_PATTERNS:
        raise ConfigError(f"never has {len(notations)} patterns", hint=f"at most {MAX_PATTERNS}: join some with |")
    for notation in notations:
        network_of(notation)


@lru_cache(maxsize=256)
def network_of(notation: str) -> Network:
    """Return the network of `re:PATTERN` or `rule:NAME`.

    Raises:
        ConfigError: If it is neither, or can't be followed while a reply is written; names why.
    """
    try:
        patterns = rule_patterns(notation)
    except RewardError as error:
        raise ConfigError(f"never={notation!r} is not allowed: {error.message}", hint=error.hint) from None
    trees = [
        (simplified(parse(pattern.pattern, pattern.flags, notation), notation), check) for pattern, check in patterns
    ]
    return Network(trees, notation)


class PatternAutomaton:
    """Finds the matches of patterns in a text that is read from left to right.

    Args:
        notation: `re:PATTERN` or `rule:NAME`.
        stop: Strings that end the text where they begin.
        common: The characters that a text may go on with.

    Attributes:
        start: The state before any text.
        work: The states of the network that were passed so far, to bound the time by.

    Raises:
        ConfigError: See `network_of`.
    """

    def __init__(self, notation: str, stop: Sequence[str] = (), common: Iterable[str] = ()) -> None:
        self._network = network_of(notation)
        self._stop = StopStrings(stop)
        stops = [Characters(regex.escape(character)) for character in sorted(set("".join(stop)))]
        sets = [*self._network.characters, *stops]
        single = self._network.kept | {*range(len(self._network.characters), len(sets))}
        self._alphabet = Alphabet(sets, single, common)
        self._looks: dict[str, tuple[int, int]] = {}
        self._known: dict[tuple[Core, str], Core | None] = {}
        self._ends: dict[Core, bool] = {}
        self._doomed: dict[Core, bool] = {}
        self._begun_by: LRUCache[bytes, frozenset[str]] = LRUCache(_MANY)
        self._num_known = self.work = 0
        self.start = PatternState(Core(frozenset(), self._looks_at_edge(is_ahead=False)))
        self._looks_at_end = self._looks_at_edge(is_ahead=True)

    def is_found(self, text: str) -> bool:
        """Return whether a text has a match, wherever it stands, as with blanks around it."""
        before = self.read(self.start, " ")
        after = None if before is None else self.read(before, text)
        return before is not None and (after is None or (bool(after.core.begun) and self.read(after, " ") is None))

    def symbols(self, text: str) -> str:
        """Return a text in symbols, one a character: characters that no pattern tells apart have the same."""
        return self._alphabet.read(text)

    def read(self, state: PatternState, text: str) -> PatternState | None:
        """Return the state after more text; None: a match is complete in it."""
        after: PatternState | None = state
        for symbol in self._alphabet.read(text):
            if after is None:
                return None
            after = self.step(after, symbol)
        return after

    def step(self, state: PatternState, symbol: str) -> PatternState | None:
        """Return the state after one more symbol; None: a match is complete with it."""
        core, stops = state
        if self._stop.texts:
            read = self._stop.read(stops, self._alphabet.character(symbol), ends=self.ends(state))
            if read is None:
                return None
            stops = read
        key = (core, symbol)
        try:
            after = self._known[key]
        except KeyError:
            after = self._advance(core, symbol)
            self._keep(key, after)
        return None if after is None else PatternState(after, stops)

    def ends(self, state: PatternState) -> bool:
        """Return whether a text that ended here would have a match."""
        return self._is_match_at_end(state.core)

    def quiet(self, state: PatternState) -> PatternState:
        """Return the state in which no match has begun, with the same character and stop strings before."""
        return PatternState(Core(frozenset(), state.core.looks), state.stops)

    def is_hopeless(self, state: PatternState, unfinished: bytes) -> bool:
        """Return whether every character that begins with these bytes completes a match."""
        return all(self.step(state, symbol) is None for symbol in self.symbols_that_begin(unfinished))

    def symbols_that_begin(self, unfinished: bytes) -> frozenset[str]:
        """Return the symbols of the characters that begin with these bytes; of very many, some are looked at."""
        found = self._begun_by.get(unfinished)
        if found is None:
            codes = possible_codes(unfinished)
            some = codes if len(codes) <= _MANY else codes[::_EVERY]
            found = self._alphabet.symbols_of("".join(chr(code) for code in some if not 0xD800 <= code < 0xE000))
            self._begun_by[unfinished] = found
        return found

    def _keep(self, key: tuple[Core, str], after: Core | None) -> None:
        self._num_known += 1 + len(key[0].begun)
        if self._num_known > _MAX_KNOWN:
            self._num_known = 0
            for known in (self._known, self._ends, self._doomed):
                known.clear()
        self._known[key] = after

    def _advance(self, core: Core, symbol: str) -> Core | None:
        after = self._read_symbol(core, symbol)
        return None if after is None or self._is_doomed(after) else after

    def _read_symbol(self, core: Core, symbol: str) -> Core | None:
        """Return the matches begun after a symbol; None: one is complete, whatever follows."""
        sets, character = self._alphabet.sets_of(symbol), self._alphabet.character(symbol)
        back, ahead = self._looks_at(symbol)
        looks, begun = core.looks | ahead, set()
        for state, text in (*core.begun, (self._network.start, "")):
            checks, steps = self._network.reach(state, looks)
            if any(check is None or check(text) for check in checks):
                return None
            self.work += 1 + len(steps)
            for number, target, is_kept in steps:
                if sets >> number & 1:
                    begun.add((target, text + character if is_kept else text))
        after = Core(frozenset(begun), back)
        return None if self._is_match(after, back) else after

    def _is_match(self, core: Core, looks: int) -> bool:
        reached = ((self._network.reach(state, looks).checks, text) for state, text in core.begun)
        return any(check is None or check(text) for checks, text in reached for check in checks)

    def _is_match_at_end(self, core: Core) -> bool:
        if core not in self._ends:
            self._ends[core] = self._is_match(core, core.looks | self._looks_at_end)
        return self._ends[core]

    def _is_doomed(self, core: Core) -> bool:
        """Return whether there is a match if the text ends here, and however it goes on."""
        if not self._is_match_at_end(core):
            return False
        if core not in self._doomed:
            seen, left, before = {core}, [core], self.work
            while left:
                one = left.pop()
                for symbol in self._alphabet.common:
                    after = self._read_symbol(one, symbol)
                    if after is None or after in seen:
                        continue
                    if not self._is_match_at_end(after) or self.work - before > _MAX_AHEAD:
                        self._doomed[core] = False
                        return False
                    seen.add(after)
                    left.append(after)
            self._doomed.update(dict.fromkeys(seen, True))
        return self._doomed[core]

    def _looks_at(self, symbol: str) -> tuple[int, int]:
        """Return the looks that hold behind a symbol, and before it."""
        if symbol not in self._looks:
            sets, back, ahead = self._alphabet.sets_of(symbol), 0, 0
            for bit, (look, number) in enumerate(self._network.looks):
                if bool(sets >> number & 1) == look.is_in:
                    back |= (not look.is_ahead) << bit
                    ahead |= look.is_ahead << bit
            self._looks[symbol] = back, ahead
        return self._looks[symbol]

    def _looks_at_edge(self, *, is_ahead: bool) -> int:
        looks = enumerate(self._network.looks)
        return sum(1 << bit for bit, (look, _) in looks if look.is_ahead == is_ahead and not look.is_in)
