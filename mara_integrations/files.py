"""Writing files so that a reader never sees half of one, and the folder for those that can be made again."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import filelock
import platformdirs

from mara_integrations.errors import OutputError


def write_atomically(
    path: str | Path, data: bytes | str | Callable[[BinaryIO], None], *, private: bool = False
) -> None:
    """Write a file under a temporary name and move it into place; make the folders above it.

    Args:
        path: The file; one that is there already is replaced.
        data: The content, or a function that writes it to an open file.
        private: Only the user may read the file (mode 0600). Otherwise the user's umask decides.

    Raises:
        OutputError: If it can't be written; names the path and the system's reason. Nothing half-written is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    mode = 0o600 if private else 0o666
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            if callable(data):
                data(file)
            else:
                file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def append_line(path: str | Path, line: str) -> None:
    """Add a line to a log; see `write_atomically` for errors."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise _unwritable(path, error) from None


def check_writable(folder: str | Path) -> None:
    """Find out before the work whether its result can be written; leaves nothing behind but the folder's parents.

    Raises:
        OutputError: If the folder can't be made or written to.
    """
    folder = Path(folder)
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise OutputError(f"can't write to {str(folder)!r}: {str(nearest)!r} is a file", hint="name another folder")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"can't write {str(path)!r}: {error.strerror or error}", hint="check permissions and free space")


def make_folder_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder by `write` unless it is there; it appears whole or not at all, and one process writes.

    Raises:
        OSError: If it can't be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return
        for left in folder.parent.glob(f"{folder.name}.tmp-*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.tmp-"))
        try:
            write(partial)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def cache_dir() -> Path:
    """The folder for what can be made again: `MARA_CACHE_DIR`, else the platform's cache folder."""
    named = os.environ.get("MARA_CACHE_DIR")
    return (
        Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("mara_integrations", appauthor=False))
    )
