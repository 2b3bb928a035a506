"""Hidden states of many tokens: in memory, or past a bound in a file that the system reads and forgets as it must."""

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
    """Parts of half precision, (n, d) each, as one (N, d); past the bound in a file without a name.

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
    ) as own:  # Windows keeps it
        whole, start = on_disk(Path(own) / "states", num_rows, width), 0
        for part in parts:
            whole[start : start + len(part)] = part
            start += len(part)
    return whole


def on_disk(file: Path, num_rows: int, width: int) -> Tensor:
    """Zeros of half precision, (num_rows, width), in a file, which is written over.

    Raises:
        OutputError: If the disk has no room for it.
    """
    _reserve(file, 2 * num_rows * width)
    return torch.from_file(str(file), shared=True, size=num_rows * width, dtype=torch.half).view(num_rows, width)


def _reserve(file: Path, num_bytes: int) -> None:
    """Take the room now: a full disk met later, while writing to mapped memory, would end the process."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as handle:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), 0, num_bytes)
            else:  # macOS and Windows promise no room
                handle.truncate(num_bytes)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise OutputError(
            f"no room for {num_bytes / 1e9:.1f} GB of hidden states at {str(file)!r}: {error.strerror or error}",
            hint="free space, or write fewer replies",
        ) from None
