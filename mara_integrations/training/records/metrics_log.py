"""metrics.jsonl: the figures of a run, which its trackers get too; a resumed run goes on where it was interrupted."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mara_integrations.files import append_line, write_atomically
from mara_integrations.training.records.trackers import Tracker, TrackerName, numbers, open_trackers

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Lines in a head's folder.

    A resumed run does some of its work again, and says the same of it: what stands there already is not said twice.

    Args:
        folder: Of the head.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / METRICS_FILE
        self._started = time.monotonic()
        self._trackers: tuple[Tracker, ...] = ()
        self._counts: Counter[str] = Counter()
        self._known: Counter[str] = Counter()  # of the interrupted run, not met again yet
        self._is_open = False

    @property
    def elapsed_s(self) -> float:
        """Of the run, without the time it was interrupted."""
        return time.monotonic() - self._started

    @contextmanager
    def opened(self, fingerprint: str, track: Sequence[TrackerName], start: Mapping[str, Any]) -> Iterator[None]:
        """Start the file, or go on with that of an interrupted run; trackers end with the run, however it ends.

        Args:
            fingerprint: Of all that decides what the run does.
            track: Trackers.
            start: What the first line says, with `config` for the trackers.
        """
        lines = _lines(self._path)
        run = str(lines[0].get("run", "")) if lines else ""
        resumes = run.startswith(f"{fingerprint}-") and lines[-1]["event"] != "done"
        if resumes:
            write_atomically(self._path, "".join(f"{json.dumps(line)}\n" for line in lines))  # no half of a last line
            self._started -= lines[-1]["elapsed_s"]
            self._known = Counter(_said(line) for line in lines)
        else:
            self._path.unlink(missing_ok=True)
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
        """Add a line, unless the interrupted run had said the same; what is only tried, in a dry run too, adds none."""
        if not self._is_open:
            return
        if self._known[said := _said({"event": event, **values})]:
            self._known[said] -= 1
        else:
            self._write(event, values)
            for tracker in self._trackers:
                tracker.log(event, numbers(values), self._counts[event])
        self._counts[event] += 1

    def _write(self, event: str, values: Mapping[str, Any]) -> None:
        append_line(self._path, json.dumps({"event": event, "elapsed_s": round(self.elapsed_s, 2), **values}))


def _lines(path: Path) -> list[dict[str, Any]]:
    """Those of a file up to the first that is damaged, as the last is when a process is killed while it writes."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines


def _said(line: Mapping[str, Any]) -> str:
    """What a line says: not when, and of numbers three digits, as a GPU does not repeat the last ones."""
    values = {name: value for name, value in line.items() if name != "elapsed_s"}
    return json.dumps(_rounded(json.loads(json.dumps(values))), sort_keys=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return f"{value:.3g}" if isinstance(value, float) else value
