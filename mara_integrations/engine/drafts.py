"""Guesses at what comes next, from what was there before: text that is copied is fed ahead and only verified.

Knows token ids and how its guesses fared; whether one is right is decided where tokens are taken. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

# Longer matches are better guesses and are looked for first.
_NGRAM_SIZES = (3, 2)
# Positions without a guess after none of a guess was right.
_PAUSE = 8


class NgramDraft:
    """Looks the last tokens up in everything before them and proposes what followed there.

    The length of a guess grows by one token while guesses hold and is halved when one fails; after a run of failures
    there is a pause.

    Args:
        token_ids: The prompt.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest occurrence ends
        self._length = 4
        self._pause = 0
        self.extend(token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take in tokens that are settled."""
        for token_id in token_ids:
            end = len(self._token_ids)
            for size in _NGRAM_SIZES:  # not with `token_id` itself: a lookup must find an occurrence before the last
                if end >= size:
                    self._ends[tuple(self._token_ids[end - size :])] = end
            self._token_ids.append(token_id)

    def propose(self, guess: Sequence[int], max_length: int) -> list[int]:
        """What may follow the settled tokens and `guess`, a token or none that is likely to come first.

        Returns:
            At most `max_length` tokens, none where nothing matches or guesses keep failing.
        """
        if self._pause > 0:
            self._pause -= 1
            return []
        length = min(self._length, max_length)
        for size in _NGRAM_SIZES:
            tail = tuple([*self._token_ids[-size:], *guess][-size:])
            end = self._ends.get(tail) if len(tail) == size else None
            if end is not None and length > 0:
                return self._token_ids[end : end + length]
        return []

    def observe(self, num_kept: int, num_proposed: int) -> None:
        """Learn how much of a guess was right."""
        if num_kept == num_proposed:
            self._length += 1
        else:
            self._length = max(num_kept, self._length // 2, 1)
            if num_kept == 0 and self._length == 1:
                self._pause = _PAUSE
