"""Regular expressions of users, searched within a time limit: one that backtracks without end becomes one error."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import regex

from mara_integrations.errors import ConfigError, RewardError

PATTERN_PREFIX = "re:"
MAX_PATTERN_CHARS = 1000
_LIMIT_S = 2.0  # for one text; a pattern of use takes milliseconds


@lru_cache(maxsize=256)
def compiled(pattern: str) -> Any:
    """Return a regular expression of the package `regex`, which knows more of Unicode than `re`.

    Raises:
        ConfigError: If it is none, or too long.
    """
    if len(pattern) > MAX_PATTERN_CHARS:
        raise ConfigError(
            f"pattern {pattern[:40]!r}... has {len(pattern)} characters", hint=f"at most {MAX_PATTERN_CHARS}"
        )
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ConfigError(
            f"pattern {pattern!r} is not a regular expression: {error}", hint="the syntax is that of the package regex"
        ) from None
    except RecursionError:
        raise ConfigError(f"pattern {pattern[:40]!r}... has too many groups within groups") from None


def spans(pattern: str, text: str) -> list[tuple[int, int]]:
    """Return the (start, end) spans of all matches but empty ones, from left to right.

    Raises:
        RewardError: If the search takes too long.
    """
    try:
        found = [match.span() for match in compiled(pattern).finditer(text, timeout=_LIMIT_S)]
    except TimeoutError:
        raise _too_slow(pattern, text) from None
    return [(start, end) for start, end in found if end > start]


def is_found(pattern: str, text: str) -> bool:
    """Return whether a pattern matches anywhere.

    Raises:
        RewardError: If the search takes too long.
    """
    try:
        return compiled(pattern).search(text, timeout=_LIMIT_S) is not None
    except TimeoutError:
        raise _too_slow(pattern, text) from None


def _too_slow(pattern: str, text: str) -> RewardError:
    return RewardError(
        f"pattern {pattern!r:.200} took longer than {_LIMIT_S:g} s on a text of {len(text)} characters",
        hint="repetitions within repetitions, as (a+)+, may take exponential time: write them without, or as (a++)+",
    )
