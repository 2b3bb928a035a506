"""The states of patterns and what leads from one to the next: Thompson's construction, with looks at one character.

Source: Thompson 1968, "Regular expression search algorithm".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

from mara_integrations.engine.patterns.tree import Beside, Beyond, Chain, Characters, Either, Node, Read, Repeat
from mara_integrations.errors import ConfigError

Check: TypeAlias = Callable[[str], bool]

MAX_PARTS = 256  # characters that a pattern reads, with its repetitions written out
MAX_SETS = 64  # different ones
_MAX_STATES = 16 * MAX_PARTS
_MAX_KNOWN = 20_000


class Step(NamedTuple):
    """What is read in a state.

    Attributes:
        characters: Number of the set.
        target: The state after it.
        is_kept: Whether the character is part of the text that a check is asked about.
    """

    characters: int
    target: int
    is_kept: bool


class Reach(NamedTuple):
    """What is reached between two characters: checks of complete matches (None: no check), and what may be read."""

    checks: tuple[Check | None, ...]
    steps: tuple[Step, ...]


class _State:
    """A state: it reads, or ends a match, or leads to others at once, if its look holds."""

    __slots__ = ("checks", "look", "step", "targets")

    def __init__(self, targets: Iterable[int] = (), look: int | None = None, step: Step | None = None) -> None:
        self.targets, self.look, self.step = list(targets), look, step
        self.checks: tuple[Check | None, ...] = ()  # one, if a match ends here


class Network:
    """Patterns as one network of states.

    Args:
        patterns: Simplified trees, each with its check.
        shown: What messages call them.

    Attributes:
        characters: The sets that are read or looked at.
        kept: Numbers of the sets that checks are asked about.
        looks: The looks at one character, each with the number of its set; bit n of a mask is look n.
        start: The state in which every match begins.

    Raises:
        ConfigError: If they are too large, or match where there is no text.
    """

    def __init__(self, patterns: Iterable[tuple[Node, Check | None]], shown: str) -> None:
        self.characters: list[Characters] = []
        self.looks: list[tuple[Beside, int]] = []
        self.kept: set[int] = set()
        self._states: list[_State] = []
        self._shown, self._num_parts = shown, 0
        self._reached: dict[tuple[int, int], Reach] = {}
        entries = []
        for node, check in patterns:
            end = self._add(_State())
            self._states[end].checks = (check,)
            entries.append(self._build(node, end, is_kept=check is not None))
        self.start = self._add(_State(entries))
        if self.reach(self.start, -1).checks:
            raise ConfigError(
                f"never={shown!r} matches where there is no text at all, so in every reply",
                hint="write + for *, or {1,} for {0,}",
            )

    def reach(self, state: int, looks: int) -> Reach:
        """Return what is reached from a state where the looks of a mask hold."""
        key = (state, looks)
        found = self._reached.get(key)
        if found is None:
            if len(self._reached) >= _MAX_KNOWN:
                self._reached.clear()
            found = self._reached[key] = self._search(state, looks)
        return found

    def _search(self, state: int, looks: int) -> Reach:
        checks, steps = list[Check | None](), list[Step]()
        seen, left = {state}, [state]
        while left:
            one = self._states[left.pop()]
            checks += one.checks
            if one.step is not None:
                steps.append(one.step)
            if one.look is None or looks >> one.look & 1:
                left += [target for target in one.targets if target not in seen]
                seen.update(one.targets)
        return Reach(tuple(checks), tuple(steps))

    def _build(self, node: Node, after: int, *, is_kept: bool) -> int:
        """Add the states of a tree that lead to the state `after`; return the first."""
        match node:
            case Read(characters):
                self._num_parts += 1
                number = self._number(characters)
                if is_kept:
                    self.kept.add(number)
                return self._add(_State(step=Step(number, after, is_kept)))
            case Beside():
                return self._add(_State([after], look=self._look(node)))
            case Chain(parts):
                for part in reversed(parts):
                    after = self._build(part, after, is_kept=is_kept)
                return after
            case Either(branches):
                return self._add(_State([self._build(branch, after, is_kept=is_kept) for branch in branches]))
            case Repeat():
                return self._repeat(node, after, is_kept)
            case Beyond(item):
                return self._build(item, after, is_kept=False)
        raise AssertionError(f"{node} is not simplified")

    def _repeat(self, node: Repeat, after: int, is_kept: bool) -> int:
        num_more = node.least
        if node.most is None:
            again = self._add(_State([after]))
            entry = self._build(node.item, again, is_kept=is_kept)
            self._states[again].targets.append(entry)
            after, num_more = (again, 0) if not node.least else (entry, node.least - 1)
        else:
            end = after
            for _ in range(node.most - node.least):
                after = self._add(_State([self._build(node.item, after, is_kept=is_kept), end]))
        for _ in range(num_more):
            before, after = after, self._build(node.item, after, is_kept=is_kept)
            if before == after:  # nothing, however often
                break
        return after

    def _add(self, state: _State) -> int:
        self._states.append(state)
        if self._num_parts > MAX_PARTS or len(self._states) > _MAX_STATES or len(self.characters) > MAX_SETS:
            raise ConfigError(
                f"never={self._shown!r} is too large: with its repetitions written out it may read {MAX_PARTS} "
                f"characters, of {MAX_SETS} kinds",
                hint="bound its repetitions more tightly, or leave them unbounded",
            )
        return len(self._states) - 1

    def _number(self, characters: Characters) -> int:
        if characters not in self.characters:
            self.characters.append(characters)
        return self.characters.index(characters)

    def _look(self, look: Beside) -> int:
        entry = (look, self._number(look.characters))
        if entry not in self.looks:
            self.looks.append(entry)
        return self.looks.index(entry)
