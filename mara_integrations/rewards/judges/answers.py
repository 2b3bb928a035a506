"""What judges have said, kept on disk by the content of the question: a judgement is paid once."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from mara_integrations.errors import OutputError

_WAIT_S = 60.0  # for another process that writes
_AT_ONCE = 500  # keys of one query; SQLite allows 999 variables


class Answers:
    """A table of texts by key, in a file of SQLite, which several processes may share.

    Args:
        path: The file; None keeps everything in memory.
        is_read_only: Whether new answers stay in memory alone.
    """

    def __init__(self, path: Path | None = None, *, is_read_only: bool = False) -> None:
        self._path, self._is_read_only = path, is_read_only
        self._new: dict[str, str] = {}

    def get(self, keys: Sequence[str]) -> dict[str, str]:
        """Return the answers that there are, by key.

        Raises:
            OutputError: If the file is damaged or can't be read.
        """
        found = {key: self._new[key] for key in keys if key in self._new}
        if self._path is None or not self._path.exists():
            return found
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        with self._opened() as table:
            for start in range(0, len(missing), _AT_ONCE):
                part = missing[start : start + _AT_ONCE]
                marks = ", ".join("?" * len(part))
                found.update(table.execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", part))
        return found

    def put(self, key: str, answer: str) -> None:
        """Keep an answer; it is on disk when this returns.

        Raises:
            OutputError: If it can't be written.
        """
        if self._path is None or self._is_read_only:
            self._new[key] = answer
            return
        with self._opened() as table, table:
            table.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, answer))

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """Open the file for one transaction: a connection belongs to one thread, and judges are asked from several."""
        assert self._path is not None
        try:
            if not self._is_read_only:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.touch(mode=0o600)  # answers may quote what is private
            with closing(sqlite3.connect(self._path, timeout=_WAIT_S)) as table:
                if not self._is_read_only:
                    table.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
                yield table
        except (OSError, sqlite3.Error) as error:
            raise OutputError(
                f"answers of judges can't be kept in {str(self._path)!r}: {error}",
                hint="check permissions and free space, or remove the file if it is damaged",
            ) from None
