"""Prefixes kept between requests: system prompts, retrieved contexts and earlier turns are not computed twice.

Prefixes are found by hashes of their blocks, each hash covering all tokens up to the end of its block: a look-up takes
a few steps, however many prefixes are kept.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

# Tokens of a block. A shorter prefix is not worth a copy.
BLOCK_TOKENS = 16


class Prefix(Protocol):
    """The first tokens of a row as a backend keeps them; opaque but for its size."""

    @property
    def num_bytes(self) -> int:
        """Memory held."""


class PrefixCache:
    """Kept prefixes by their tokens, the least recently used dropped first.

    Args:
        max_bytes: Most memory that they hold together.
        max_entries: Most prefixes.
    """

    def __init__(self, max_bytes: int = 256 << 20, max_entries: int = 1024) -> None:
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.num_bytes = 0
        self._entries: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self._by_block: dict[int, dict[tuple[int, ...], None]] = {}  # hash of a block -> entries that have it, in order

    def longest(self, token_ids: Sequence[int], hashes: Sequence[int] | None = None) -> tuple[Prefix | None, int]:
        """Find the kept prefix that shares most tokens with the beginning of these, as far as blocks tell.

        Args:
            token_ids: A prompt.
            hashes: Its `block_hashes`, where they are known.

        Returns:
            The prefix and the number of tokens shared; (None, 0) if it is less than a block.
        """
        hashes = block_hashes(token_ids) if hashes is None else hashes
        num_blocks = bisect_left(range(len(hashes)), True, key=lambda block: hashes[block] not in self._by_block)
        if not num_blocks:
            return None, 0
        entry = next(reversed(self._by_block[hashes[num_blocks - 1]]))
        length = min(shared(entry, token_ids), len(token_ids) - 1)  # the last token is fed: its state is needed
        if length < BLOCK_TOKENS:
            return None, 0
        self._entries.move_to_end(entry)
        return self._entries[entry], length

    def add(self, token_ids: Sequence[int], keep: Callable[[], Prefix | None]) -> None:
        """Keep a row's tokens, unless they are kept already; entries that they continue are dropped for them."""
        tokens = tuple(token_ids)
        hashes = block_hashes(tokens)
        if not hashes or not self.max_bytes:
            return
        if any(shared(entry, tokens) == len(tokens) for entry in self._by_block.get(hashes[-1], ())):
            return
        prefix = keep()
        if prefix is None or prefix.num_bytes > self.max_bytes:
            return
        continued = [entry for entry in self._by_block.get(hashes[0], ()) if tokens[: len(entry)] == entry]
        for entry in continued:
            self._drop(entry)
        self._entries[tokens] = prefix
        self.num_bytes += prefix.num_bytes
        for block in hashes:
            self._by_block.setdefault(block, {})[tokens] = None
        while self.num_bytes > self.max_bytes or len(self._entries) > self.max_entries:
            self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._by_block.clear()
        self.num_bytes = 0

    def _drop(self, entry: tuple[int, ...]) -> None:
        self.num_bytes -= self._entries.pop(entry).num_bytes
        for block in block_hashes(entry):
            entries = self._by_block[block]
            del entries[entry]
            if not entries:
                del self._by_block[block]


def block_hashes(token_ids: Sequence[int]) -> list[int]:
    """Return a hash for each whole block, of all tokens from the first to the end of the block."""
    hashes, last = [], 0
    for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        last = hash((last, *token_ids[start : start + BLOCK_TOKENS]))
        hashes.append(last)
    return hashes


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # bisection: comparing slices is fast
        middle = (low + high + 1) // 2
        if tuple(a[low:middle]) == tuple(b[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low
