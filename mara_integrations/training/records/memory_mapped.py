"""Holds the hidden states of many tokens: in memory, or past a bound in a memory-mapped file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mara_integrations.errors import OutputError
from mara_integrations.files import cache_dir

MAX_BYTES_IN_MEMORY = 2 << 30


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Join parts of half precision, (n, d) each, into one (N, d); past the bound in a file without a name.

    Raises:
        OutputError: If the disk has no room for it.
    """
    if len(parts) == 1:
        return parts[0]
    num_rows, width = sum(map(len, parts)), parts[0].shape[1]
    if 2 * num_rows * width <= MAX_BYTES_IN_MEMORY:
        return torch.cat(list(parts))
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder, prefix="states-", ignore_cleanup_errors=True
    ) as own:  # Windows can't delete it while it is mapped
        whole, start = on_disk(Path(own) / "states", num_rows, width), 0
        for part in parts:
            whole[start : start + len(part)] = part
            start += len(part)
    return whole


def on_disk(file: Path, num_rows: int, width: int) -> Tensor:
    """Return zeros of half precision, (num_rows, width), in a file, which is overwritten.

    Raises:
        OutputError: If the disk has no room for it.
    """
    _reserve(file, 2 * num_rows * width)
    return torch.from_file(str(file), shared=True, size=num_rows * width, dtype=torch.half).view(num_rows, width)


def _reserve(file: Path, num_bytes: int) -> None:
    """Allocate the file now: if the disk filled up later, a write to mapped memory would kill the process."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as handle:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), 0, num_bytes)
            else:  # macOS and Windows reserve nothing
                handle.truncate(num_bytes)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise OutputError(
            f"no room for {num_bytes / 1e9:.1f} GB of hidden states at {str(file)!r}: {error.strerror or error}",
            hint="free space, or write fewer replies",
        ) from None
