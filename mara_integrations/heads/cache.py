"""Heads read from disk and kept in memory: a thousand small ones or a few large, within a budget of bytes."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from cachetools import LRUCache

from mara_integrations.errors import ConfigError, HeadError
from mara_integrations.heads.folder import CONFIG_FILE, file_stamp
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.hub import Location, locate

_log = logging.getLogger(__name__)

# Room for a thousand heads of a model of width 576, as the trainer makes them.
MAX_BYTES = 4 << 30
_GRACE_S = 5.0  # time to replace a folder by another


@dataclass(slots=True)
class _Entry:
    """A head in memory.

    Attributes:
        head: The head.
        stamp: Stamp of its files when they were read; see `file_stamp`.
        failing_since: When its files were first found damaged or missing; None while they are whole.
    """

    head: MARAHead
    stamp: tuple[int, ...] | None
    failing_since: float | None = None


class HeadCache:
    """Heads by their locations, the least recently used dropped first. Any thread may call it.

    Whether a name is a local path or a Hub id is decided when it is first used: a folder that disappears is never
    looked for on the Hub. A head whose files change is read again; while they are missing or damaged, which they may
    be for a moment when a folder is replaced, the head read before stays for `grace_s`. A head in use by a request
    lives on with it when it is dropped here.

    Args:
        max_bytes: Memory that the heads may hold together.
        grace_s: How long a head stays whose files are missing or damaged, in seconds.
        clock: Returns the time, in seconds.
    """

    def __init__(
        self, max_bytes: int = MAX_BYTES, *, grace_s: float = _GRACE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._grace_s = grace_s
        self._clock = clock
        self._locations: dict[tuple[str, str], Location] = {}
        self._entries = _lru(max_bytes)
        self._lock = threading.Lock()

    @property
    def max_bytes(self) -> int:
        """Memory that the heads may hold together; can be set at any time."""
        return int(self._entries.maxsize)

    @max_bytes.setter
    def max_bytes(self, max_bytes: int) -> None:
        entries = _lru(max_bytes)
        with self._lock:
            while self._entries:
                key, entry = self._entries.popitem()  # the least recently used
                if entry.head.num_bytes <= max_bytes:
                    entries[key] = entry
            self._entries = entries

    @property
    def num_bytes(self) -> int:
        """Memory that the heads hold together."""
        return int(self._entries.currsize)

    def locate(self, source: str | Path) -> Location:
        """Find a head, and remember where it was found; see `hub.locate`.

        Raises:
            HeadError: If there is none.
        """
        key = str(source), "" if os.path.isabs(source) else os.getcwd()
        location = self._locations.get(key)
        if location is None:
            location = self._locations.setdefault(key, locate(source))
        return location

    def get(self, source: str | Path, device: torch.device | str = "cpu") -> MARAHead:
        """Return a head on a device: one object for all that name it, so that a batch evaluates it once.

        Raises:
            HeadError: If it can't be read, or is larger than the memory for all heads.
        """
        location = self.locate(source)
        key = str(location.path), torch.device(device)
        stamp = file_stamp(location.path / CONFIG_FILE if location.is_folder else location.path)
        with self._lock:
            entry = self._entries.get(key)
        if entry is not None and entry.stamp == stamp is not None:
            entry.failing_since = None
            return entry.head
        try:
            head = MARAHead.from_pretrained(location).to(device)  # unlocked: requests for other heads do not wait
        except HeadError as error:
            if entry is None or not self._may_stay(entry):
                raise
            _log.warning("still using the head as it was read before: %s", error)
            return entry.head
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.stamp == stamp is not None:  # another thread was faster
                return entry.head
            try:
                self._entries[key] = _Entry(head, stamp)
            except ValueError:
                raise HeadError(
                    f"head {location.name!r} takes {head.num_bytes:,} bytes; all heads together may take "
                    f"{self.max_bytes:,}",
                    hint="raise head_cache_bytes",
                ) from None
        return head

    def _may_stay(self, entry: _Entry) -> bool:
        if entry.failing_since is None:
            entry.failing_since = self._clock()
        return self._clock() - entry.failing_since < self._grace_s

    def __len__(self) -> int:
        return len(self._entries)


def _lru(max_bytes: int) -> LRUCache[tuple[str, torch.device], _Entry]:
    if max_bytes < 1:
        raise ConfigError(f"head_cache_bytes={max_bytes!r} is not allowed", hint="at least 1")
    return LRUCache(max_bytes, getsizeof=lambda entry: entry.head.num_bytes)
