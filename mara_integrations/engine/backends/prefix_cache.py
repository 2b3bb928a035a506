"""Prefixes kept between requests: system prompts, retrieved contexts and earlier turns are not computed twice."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

# A shorter one is not worth a copy.
MIN_TOKENS = 16


class Prefix(Protocol):
    """What a backend keeps of a row; opaque but for its size."""

    @property
    def num_bytes(self) -> int:
        """Memory held."""


class PrefixCache:
    """Kept prefixes by their tokens, the least recently used dropped first.

    Args:
        max_bytes: Memory they may hold together.
        max_entries: How many there may be; each is compared with every new prompt.
    """

    def __init__(self, max_bytes: int = 256 << 20, max_entries: int = 64) -> None:
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.num_bytes = 0
        self._entries: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()

    def longest(self, token_ids: Sequence[int]) -> tuple[Prefix | None, int]:
        """The kept prefix that shares most tokens with the beginning of these, and how many; (None, 0) if too few."""
        best = max(self._entries, key=lambda tokens: shared(tokens, token_ids), default=())
        length = min(shared(best, token_ids), len(token_ids) - 1)  # the last token is fed: its state is needed
        if length < MIN_TOKENS:
            return None, 0
        self._entries.move_to_end(best)
        return self._entries[best], length

    def add(self, token_ids: Sequence[int], keep: Callable[[], Prefix | None]) -> None:
        """Keep a row's tokens, unless they are kept already; entries that they continue are dropped for them."""
        tokens = tuple(token_ids)
        if len(tokens) < MIN_TOKENS or any(shared(entry, tokens) == len(tokens) for entry in self._entries):
            return
        prefix = keep()
        if prefix is None or prefix.num_bytes > self.max_bytes:
            return
        for entry in [entry for entry in self._entries if shared(entry, tokens) == len(entry)]:
            self._drop(entry)
        self._entries[tokens] = prefix
        self.num_bytes += prefix.num_bytes
        while self.num_bytes > self.max_bytes or len(self._entries) > self.max_entries:
            self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.num_bytes = 0

    def _drop(self, entry: tuple[int, ...]) -> None:
        self.num_bytes -= self._entries.pop(entry).num_bytes


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # bisection: comparing slices is fast
        middle = (low + high + 1) // 2
        if tuple(a[low:middle]) == tuple(b[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low
