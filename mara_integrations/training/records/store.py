"""Keeps work in files: finished stages of an interrupted run, and replies that every later run can use.

A file is plain data with a format version and a digest, written whole or not at all. A file that is damaged, or of
another format version, counts as absent.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mara_integrations.errors import OutputError
from mara_integrations.files import cache_dir, write_atomically

FORMAT_VERSION = 3  # raised when the content of a file, or the way that replies are sampled, changes
# The least recently used files of the cache make room for new ones. 128 replies of 48 tokens take 40 MB for a model of
# width 576.
MAX_CACHE_BYTES = 4 << 30
_BLOCK_BYTES = 1 << 20
_DIGEST_BYTES = hashlib.sha256().digest_size


def load_or_compute(path: Path, compute: Callable[[], Any]) -> tuple[Any, bool]:
    """Return the data of a file, or compute it and write the file; and whether the file was there.

    Tensors of a file are memory-mapped: read when they are used, dropped by the system when memory is short.

    Args:
        path: The file.
        compute: Returns tensors, numbers and strings in lists, tuples and dicts.

    Raises:
        OutputError: If the file can't be written.
    """
    data = load(path)
    if data is not None:
        return data, True
    computed = compute()
    save(path, computed)
    data = load(path)  # None if another run has removed the file meanwhile
    return computed if data is None else data, False


def load(path: Path) -> Any | None:
    """Return the data of a file that `load_or_compute` wrote; None if it is absent, damaged or of another version."""
    try:
        content = torch.load(path, weights_only=True, mmap=True) if _is_whole(path) else None
    except Exception:  # a folder, a loop of links, a file that torch did not write: counts as absent
        return None
    if isinstance(content, dict) and content.get("format_version") == FORMAT_VERSION:
        return content.get("data")
    return None


def save(path: Path, data: Any) -> None:
    """Write the data of a file; see `load_or_compute`."""

    def write(file: BinaryIO) -> None:
        hashing = _HashingWriter(file)
        torch.save({"format_version": FORMAT_VERSION, "data": data}, hashing)  # type: ignore[arg-type]  # all it needs
        file.write(hashing.digest.digest())

    write_atomically(path, write, private=True)  # replies quote the user's prompts


def as_dict(instance: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name. Unlike `dataclasses.asdict`, it copies no tensor."""
    return {field.name: getattr(instance, field.name) for field in fields(instance)}


def cache_file(key: str) -> Path:
    """Return the path of cached replies, of the base model or of the data, in the cache folder (`MARA_CACHE_DIR`)."""
    return cache_dir() / "replies" / f"{key}.pt"


def share(source: Path, target: Path) -> bool:
    """Give a file a second name, or copy it where the system has no links; return whether it is there.

    Args:
        source: The file.
        target: The second name. What has it already is replaced.

    Raises:
        OutputError: If a copy can't be written.
    """
    if not source.is_file():
        return False
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, temporary)
        os.replace(temporary, target)
    except FileNotFoundError:
        return False
    except OSError:  # another file system, or one without links
        with suppress(FileNotFoundError), source.open("rb") as file:  # another run may have removed it
            write_atomically(target, partial(shutil.copyfileobj, file), private=True)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # where both names had the file already, nothing was moved
    return target.exists()


def mark_used(path: Path) -> None:
    """Note that a file of the cache was used just now, and remove the least recently used ones beyond the bound.

    Raises:
        OutputError: If the cache can't be written to.
    """
    try:
        with suppress(FileNotFoundError):  # another run has removed it
            os.utime(path)
        _evict(path.parent)
    except OSError as error:
        raise OutputError(f"can't keep {str(path)!r}: {error.strerror}", hint="MARA_CACHE_DIR names another") from error


class _HashingWriter:
    """A file that is being written, and the digest of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _is_whole(path: Path) -> bool:
    """Return whether a file ends with the digest of its content."""
    left, digest = path.stat().st_size - _DIGEST_BYTES, hashlib.sha256()
    with path.open("rb") as file:
        while left > 0:
            block = file.read(min(left, _BLOCK_BYTES))
            digest.update(block)
            left -= len(block)
        return file.read() == digest.digest()


def _evict(folder: Path) -> None:
    """Remove the least recently used files beyond `MAX_CACHE_BYTES`."""
    found = []
    for file in folder.glob("*.pt"):
        with suppress(OSError):  # another run evicts too; a loop of links has no size
            found.append((file.stat(), file))
    total = 0
    for status, file in sorted(found, key=lambda each: each[0].st_mtime_ns, reverse=True):
        total += status.st_size
        if total > MAX_CACHE_BYTES:
            file.unlink(missing_ok=True)
