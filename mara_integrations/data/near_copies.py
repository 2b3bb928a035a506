"""Prompts that are near copies of each other, as templates make them: a split by prompt does not keep them apart."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mara_integrations.data.rows import Row

_MIN_SHARED = 0.6  # of the words of both; "How do I return shoes?" and "How do I return boots?" share 4 of 6
_MIN_WORDS = 4  # shorter prompts, and scripts without spaces, are compared by groups of three letters
_MAX_HELD_OUT, _MAX_TRAIN = 100, 2_000  # prompts that are compared: at most a second
_MAX_CHARACTERS = 1_000
_WORD = re.compile(r"\w+")


def near_copies(train: Sequence[Row], held_out: Sequence[Row]) -> tuple[int, int]:
    """Count held-out prompts that are near copies of a prompt to fit on.

    Args:
        train: Rows to fit on; at most 2,000 prompts are looked at.
        held_out: Rows that are held out; at most 100 prompts are looked at.

    Returns:
        The number of near copies, and the number of held-out prompts that were looked at.

    Source: Jaccard similarity of the sets of words of the last messages (Broder 1997).
    """
    known = list(dict.fromkeys(_words(row) for row in train))[:_MAX_TRAIN]
    asked = list(dict.fromkeys(_words(row) for row in held_out))[:_MAX_HELD_OUT]
    return sum(any(_is_near(one, other) for other in known) for one in asked), len(asked)


def _words(row: Row) -> frozenset[str]:
    text = row.prompt[-1].content[:_MAX_CHARACTERS].casefold()
    words = _WORD.findall(text)
    if len(words) < _MIN_WORDS:
        letters = "".join(words)
        words = [letters[i : i + 3] for i in range(max(1, len(letters) - 2))]
    return frozenset(words)


def _is_near(one: frozenset[str], other: frozenset[str]) -> bool:
    shared = len(one & other)
    return shared >= _MIN_SHARED * (len(one) + len(other) - shared)
