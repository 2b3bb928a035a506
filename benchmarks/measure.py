"""Timing in turns, and tables of ratios: median and range over rounds, printed and written as json."""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

Rows: TypeAlias = dict[str, dict[str, dict[str, Any]]]  # by row and column: median and range


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the benchmarks have in common."""
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--threads", type=int, help="of torch; one is timed in CPU seconds, which others do not disturb"
    )
    parser.add_argument("--json", type=Path)


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, and its result."""
    clock = time.process_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter
    start = clock()
    result = run()
    return clock() - start, result


@dataclass(frozen=True, slots=True)
class Timed:
    """A reply, and how long it took.

    Attributes:
        first_s: Of a reply of one token: mostly the prompt.
    """

    reply: list[int]
    whole_s: float
    first_s: float

    @property
    def speed(self) -> float:
        """Tokens/s, prompt included."""
        return len(self.reply) / self.whole_s

    @property
    def decoding_speed(self) -> float:
        """Tokens/s after the first."""
        return (len(self.reply) - 1) / (self.whole_s - self.first_s)


def timed(run: Callable[[int], list[int]], num_tokens: int) -> Timed:
    """Time a reply of one token and a whole one; `run` is given how many it may have."""
    first_s, _ = seconds(lambda: run(1))
    whole_s, reply = seconds(lambda: run(num_tokens))
    return Timed(list(reply), whole_s, first_s)


class Ratios:
    """Ratios of a benchmark, by row and column."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, row: str, column: str, value: float) -> None:
        """One more measurement."""
        self._values[row][column].append(value)

    def rows(self) -> Rows:
        """Median and range of each."""
        return {
            row: {
                column: {"median": statistics.median(values), "range": [min(values), max(values)]}
                for column, values in columns.items()
            }
            for row, columns in self._values.items()
        }

    def show(self, row: str) -> None:
        """Print a row."""
        for column, cell in self.rows()[row].items():
            low, high = cell["range"]
            print(f"{row:<28} {column:<48} {cell['median']:6.2f}  ({low:.2f} to {high:.2f})", flush=True)

    def write(self, path: Path | None, model: str = "", facts: Mapping[str, Any] | None = None) -> None:
        """Write all rows, if a path is given; other rows that a file has there stay.

        Args:
            path: The file.
            model: Name of the model.
            facts: Facts about the run, which the file holds beside the rows. By default, the model, and the number of
                threads and the peak memory of this process.
        """
        own = {"model": model, "threads": torch.get_num_threads(), "peak_bytes": peak_bytes()}
        about = {"machine": platform.processor() or platform.machine(), **(own if facts is None else facts)}
        if path is not None:
            before = json.loads(path.read_text())["rows"] if path.exists() else {}
            path.write_text(json.dumps({"about": about, "rows": {**before, **self.rows()}}, indent=1) + "\n")


def peak_bytes() -> int:
    """Return the most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # of this program alone: on Linux `getrusage` counts what its parent held when it was started
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
