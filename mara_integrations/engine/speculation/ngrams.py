"""Guesses at what comes next, from what was there before: text that is copied is fed ahead and only verified.

Knows token ids and how its guesses fared; whether one is right is decided where tokens are taken. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Longer matches are better guesses and are looked for first; with each, the share of right tokens to begin with.
_NGRAM_SIZES = {3: 0.7, 2: 0.5, 1: 0.2}
# Weight of one token in the running share: some ten of them tell where a copy begins and ends.
_RATE = 0.1


class NgramDraft:
    """Looks the last tokens up in everything before them and proposes what followed there.

    Args:
        token_ids: The prompt.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest occurrence ends
        self._right = dict(_NGRAM_SIZES)  # size of the match -> running share of right tokens, up to the first wrong
        self._size = 1  # of the match of the last guess
        self.extend(token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take in tokens that are settled."""
        for token_id in token_ids:
            end = len(self._token_ids)
            for size in _NGRAM_SIZES:  # not with `token_id` itself: a lookup must find an occurrence before the last
                if end >= size:
                    self._ends[tuple(self._token_ids[end - size :])] = end
            self._token_ids.append(token_id)

    def propose(self, guess: Sequence[int], length: Callable[[float], int]) -> list[int]:
        """What may follow the settled tokens and `guess`, a token or none that is likely to come first.

        Args:
            guess: None or one.
            length: How many tokens to propose at most, given the probability that one of them is right.

        Returns:
            None where nothing matches.
        """
        for size in _NGRAM_SIZES:
            tail = tuple([*self._token_ids[-size:], *guess][-size:])
            end = self._ends.get(tail) if len(tail) == size else None
            if end is not None:
                self._size = size
                return self._token_ids[end : end + length(self._right[size])]
        return []

    def observe(self, num_kept: int, num_proposed: int) -> None:
        """Learn how much of the last guess was right."""
        for is_right in (*[True] * num_kept, *[False] * (num_kept < num_proposed)):
            self._right[self._size] += _RATE * (is_right - self._right[self._size])
