"""Guess the next tokens by looking the last ones up in the earlier text. Pure; knows token ids only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Longer matches are better guesses and are looked for first. The value is the share of right tokens to begin with.
_NGRAM_SIZES = {3: 0.7, 2: 0.5, 1: 0.2}
# Weight of one token in the running share: about ten tokens tell where a copied passage begins and ends.
_RATE = 0.1


class NgramTable:
    """Finds where the last tokens occurred before, and proposes what followed there.

    Args:
        token_ids: The prompt.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest occurrence ends
        self._right = dict(_NGRAM_SIZES)  # size of the match -> running share of right tokens, up to the first wrong
        self._size = 1  # of the match that gave the last proposal
        self.extend(token_ids)

    def __len__(self) -> int:
        return len(self._token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token_id in token_ids:
            end = len(self._token_ids)
            for size in _NGRAM_SIZES:  # without `token_id` itself: a lookup has to find an earlier occurrence
                if end >= size:
                    self._ends[tuple(self._token_ids[end - size :])] = end
            self._token_ids.append(token_id)

    def propose(self, first: Sequence[int], max_tokens: Callable[[float], int]) -> list[int]:
        """Return the tokens that may follow the text and `first`; none where nothing matches.

        Args:
            first: At most one token, which is likely to follow the text.
            max_tokens: The most tokens to propose, given the probability that one of them is right.
        """
        for size in _NGRAM_SIZES:
            tail = tuple([*self._token_ids[-size:], *first][-size:])
            end = self._ends.get(tail) if len(tail) == size else None
            if end is not None:
                self._size = size
                return self._token_ids[end : end + max_tokens(self._right[size])]
        return []

    def observe(self, num_kept: int, num_proposed: int) -> None:
        """Learn how many tokens of the last proposal were right."""
        for is_right in (*[True] * num_kept, *[False] * (num_kept < num_proposed)):
            self._right[self._size] += _RATE * (is_right - self._right[self._size])
