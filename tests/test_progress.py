"""Long work says how far it is, on a terminal and in a log."""

from __future__ import annotations

import io
import re

from rich.console import Console

from mara_integrations.progress import ConsoleReporter, Reporter


def shown(*, is_terminal):
    file = io.StringIO()
    reporter = ConsoleReporter(Console(file=file, force_terminal=is_terminal, width=100))
    with reporter.stage("base replies", 10) as advance:
        for _ in range(5):
            advance(2)
    reporter.say("[bold]done[/]")
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())


def test_a_log_gets_a_line_a_quarter():
    lines = [line.split(",")[0].strip() for line in shown(is_terminal=False).splitlines()]
    assert lines == [
        "base replies: 4 of 10",
        "base replies: 6 of 10",
        "base replies: 8 of 10",
        "base replies: 10 of 10",
        "done",
    ]


def test_a_terminal_gets_a_bar():
    text = shown(is_terminal=True)
    assert "10/10" in text and "base replies" in text and "done" in text


def test_nobody_has_to_listen():
    with Reporter().stage("base replies", 1) as advance:
        advance(1)
