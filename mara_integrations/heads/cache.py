"""Heads read from disk and kept in memory, a thousand small ones or a few large: what bounds them is their bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import torch

from mara_integrations.heads.head import MARAHead

# Room for a thousand heads of a model of width 576, as the trainer makes them.
MAX_BYTES = 4 << 30

_Key = tuple[str, tuple[int, ...], torch.device]


class HeadCache:
    """Heads by where they were read from, the least recently used dropped first. Any thread may call it.

    A head in use by a request lives on with it when it is dropped here.

    Args:
        max_bytes: Memory that the heads may hold together; the last one read is kept whatever it holds.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._heads: OrderedDict[_Key, MARAHead] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, source: str | Path, device: torch.device | str = "cpu") -> MARAHead:
        """One object for all that name a head, so that a batch evaluates it once; a retrained one is read again.

        Raises:
            HeadError: If it can't be read.
        """
        key = str(source), _stamp(source), torch.device(device)
        with self._lock:
            if key in self._heads:
                self._heads.move_to_end(key)
                return self._heads[key]
        head = MARAHead.from_pretrained(source).to(device)  # unlocked: who asks for another head does not wait
        with self._lock:
            if key in self._heads:  # another thread was faster
                return self._heads[key]
            self._heads[key] = head
            self.num_bytes += head.num_bytes
            while self.num_bytes > self.max_bytes and len(self._heads) > 1:
                self.num_bytes -= self._heads.popitem(last=False)[1].num_bytes
        return head

    def __len__(self) -> int:
        return len(self._heads)


def _stamp(source: str | Path) -> tuple[int, ...]:
    """Changes when the files of a local head do."""
    path = Path(source).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    return tuple(file.stat().st_mtime_ns for file in files)
