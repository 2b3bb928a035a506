"""Locks the output folder, so that two runs do not write into it at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from mara_integrations.errors import OutputError

LOCK_FILE = "lock"


@contextmanager
def locked(output: Path, folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder; leave no folder behind that was made for the lock alone.

    Args:
        output: The output folder, for messages.
        folder: Folder of the lock's file, within it.

    Raises:
        OutputError: If another process holds the lock, or the folder can't be written to.
    """
    file = folder / LOCK_FILE
    lock = FileLock(file, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(NotImplementedError):  # some network drives have no locks
            lock.acquire()
    except Timeout:
        raise OutputError(
            f"another run is writing into {str(output)!r}", hint="wait until it ends, or name another folder"
        ) from None
    except OSError as error:
        raise OutputError(f"can't write into {str(output)!r}: {error.strerror or error}") from None
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
        lock.release()
        for made in (folder, output):
            with suppress(OSError):  # it holds something else
                made.rmdir()
