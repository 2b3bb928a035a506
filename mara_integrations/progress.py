"""Report the progress of long work: stages of a known number of steps, and lines of text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Reporter:
    """Receives news of long work; this one ignores them.

    `say` gets one line of text, with rich's markup. `stage` is a context that gives a function to call with the number
    of steps just done.
    """

    def say(self, line: str) -> None:
        """One line of news."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A part of the work with `total` steps."""
        yield lambda count: None


class ConsoleReporter(Reporter):
    """Shows stages as progress bars on a terminal, as a line every quarter elsewhere, and lines as they come."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, line: str) -> None:
        """Print one line."""
        self.console.print(line, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show how far a stage is; its last state stays, so that the times can be read afterwards."""
        if not self.console.is_terminal:
            yield self._quarters(name, total)
            return
        columns = (
            TextColumn("  {task.description:<34}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=total)
            yield lambda count: progress.advance(task, count)

    def _quarters(self, name: str, total: int) -> Callable[[int], None]:
        began, done = time.monotonic(), 0

        def advance(count: int) -> None:
            nonlocal done
            before, done = 4 * done // total, done + count
            if 4 * done // total > before:
                self.say(f"  {name}: {done} of {total}, {time.monotonic() - began:.0f} s")

        return advance
