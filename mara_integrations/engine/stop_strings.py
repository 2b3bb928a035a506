"""Stop strings as they are read: one that is cut off leaves the text before it as the end of the reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

# Stop strings begun: number, characters read, whether a reply that ends before it would end with what is forbidden.
BegunStops: TypeAlias = frozenset[tuple[int, int, bool]]


class StopStrings:
    """Tells whether a stop string would leave a forbidden end.

    Args:
        stop: The strings, none of them empty.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.texts = tuple(stop)

    def read(self, begun: BegunStops, character: str, *, ends: bool) -> BegunStops | None:
        """Return the stop strings begun after one more character; None: one is complete, and leaves a forbidden end.

        Args:
            begun: Those begun before.
            character: The character.
            ends: Whether a reply that ended before it would end with what is forbidden.
        """
        after = set()
        for number, length, leaves in (*begun, *((n, 0, ends) for n in range(len(self.texts)))):
            text = self.texts[number]
            if text[length] != character:
                continue
            if length + 1 < len(text):
                after.add((number, length + 1, leaves))
            elif leaves:
                return None
        return frozenset(after)
