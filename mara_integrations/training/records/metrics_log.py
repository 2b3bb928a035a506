"""Writes the metrics of a run to metrics.jsonl and to its trackers; a resumed run continues the file."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mara_integrations.errors import OutputError
from mara_integrations.files import append_line, write_atomically
from mara_integrations.training.records.trackers import Tracker, TrackerName, numbers, open_trackers

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """The log of metrics in an output folder.

    A resumed run repeats some of its work, and logs the same values: lines that are there already are not added again.

    Args:
        folder: The output folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / METRICS_FILE
        self._started = time.monotonic()
        self._trackers: tuple[Tracker, ...] = ()
        self._counts: Counter[str] = Counter()
        self._known: Counter[str] = Counter()  # lines of the interrupted run that were not logged again yet
        self._is_open = False

    @property
    def elapsed_s(self) -> float:
        """Seconds of the run, without the time it was interrupted."""
        return time.monotonic() - self._started

    @contextmanager
    def opened(self, fingerprint: str, track: Sequence[TrackerName], start: Mapping[str, Any]) -> Iterator[None]:
        """Start the file, or continue that of an interrupted run; close the trackers however the run ends.

        Args:
            fingerprint: Hash of everything that decides what the run does.
            track: Names of trackers.
            start: Values of the first line; `config` goes to the trackers.

        Raises:
            OutputError: If the file can't be read or written.
        """
        lines = _lines(self._path)
        run = str(lines[0].get("run", "")) if lines else ""
        resumes = run.startswith(f"{fingerprint}-") and lines[-1]["event"] != "done"
        if resumes:
            write_atomically(self._path, "".join(f"{json.dumps(line)}\n" for line in lines))  # a whole last line
            self._started -= lines[-1]["elapsed_s"]
            self._known = Counter(_key(line) for line in lines)
        else:
            _remove(self._path)
            run = f"{fingerprint}-{time.time_ns() // 1_000_000:x}"
        self._trackers = open_trackers(track, self._folder, start["config"], run=run, resumes=resumes)
        self._is_open = True
        try:
            self._write("resumed" if resumes else "start", {} if resumes else {"run": run, **start})
            yield
        finally:
            self._is_open = False
            for tracker in self._trackers:
                tracker.close()

    def log(self, event: str, values: Mapping[str, Any]) -> None:
        """Add a line, unless the interrupted run had logged the same. Outside of `opened`, in a dry run, add none."""
        if not self._is_open:
            return
        if self._known[key := _key({"event": event, **values})]:
            self._known[key] -= 1
        else:
            self._write(event, values)
            for tracker in self._trackers:
                tracker.log(event, numbers(values), self._counts[event])
        self._counts[event] += 1

    def _write(self, event: str, values: Mapping[str, Any]) -> None:
        append_line(self._path, json.dumps({"event": event, "elapsed_s": round(self.elapsed_s, 2), **values}))


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file up to the first damaged one: a process may be killed while it writes the last."""
    lines: list[dict[str, Any]] = []
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # absent, a folder, a loop of links
        return []
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or not _is_line(line):
            break
        lines.append(line)
    return lines


def _is_line(line: Mapping[str, Any]) -> bool:
    """Return whether a line has the fields that every line has."""
    return isinstance(line.get("event"), str) and isinstance(line.get("elapsed_s"), int | float)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"can't replace {str(path)!r}: {error.strerror or error}", hint="move it away") from None


def _key(line: Mapping[str, Any]) -> str:
    """Return the values of a line without its time, numbers to three digits: a GPU does not repeat the last ones."""
    values = {name: value for name, value in line.items() if name != "elapsed_s"}
    return json.dumps(_rounded(json.loads(json.dumps(values))), sort_keys=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return f"{value:.3g}" if isinstance(value, float) else value
