"""Wait for what another thread does."""

from __future__ import annotations

import time


def eventually(condition, seconds=20.0):
    """Wait until a condition holds; it is an error if it does not within the time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.002)
