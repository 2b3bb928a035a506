"""Prints an evaluation: tables, both replies to some prompts, and the legend of their marks.

Whatever a model wrote is shown without control characters, which a terminal would obey.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mara_integrations.evaluation.head_comparison import HeadComparison
from mara_integrations.evaluation.marks import Mark
from mara_integrations.evaluation.report import (
    FOOTNOTE,
    MOST_REJECTED,
    comparison_rows,
    gate_line,
    glossary,
    settings_line,
    summary_rows,
    verdict,
)
from mara_integrations.evaluation.results import Evaluation, Reply
from mara_integrations.evaluation.text import score_text, struck_text, visible


def print_summary(console: Console, evaluation: Evaluation) -> None:
    """Print the table, what the gate did, and how to read the intervals."""
    rows = [(row.measure, row.base, row.gated, row.change) for row in summary_rows(evaluation)]
    _print_table(console, f"{evaluation.model} · {evaluation.head}", ("base", "gated"), rows, settings_line(evaluation))
    console.print(Text(gate_line(evaluation)))
    console.print(Text(visible(verdict(evaluation)), style="bold"))
    for word, meaning in glossary(evaluation).items():
        console.print(Text(f"{word}: {meaning}", style="dim"))
    console.print(Text(FOOTNOTE, style="dim"))


def print_comparison(console: Console, comparison: HeadComparison) -> None:
    """Print the table of two heads."""
    title = f"{comparison.other} (other) against {comparison.first} (first)"
    _print_table(console, title, ("first", "other"), comparison_rows(comparison), "the same prompts and random numbers")


def _print_table(
    console: Console, title: str, sides: tuple[str, str], rows: Sequence[tuple[str, str, str, str]], caption: str
) -> None:
    table = Table(title=Text(visible(title)), caption=caption)
    for name in ("", *sides, "change"):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    console.print(table)


def print_regressions(console: Console, evaluation: Evaluation, count: int = 3) -> None:
    """Print the prompts on which the head did most harm, with both replies."""
    worst = evaluation.regressions(count)
    if not worst:
        return
    console.print(
        Text("Worst regressions: lower scores first, then the least likely replies of equal score", style="bold")
    )
    for number in worst:
        example = evaluation.examples[number]
        console.print(Text(visible(f"  {_shortened(example.prompt[-1].content)}")))
        for side, reply in (("base", example.base), ("gated", example.gated)):
            console.print(
                Text.assemble((f"    {side:<6}", "dim"), visible(_shortened(reply.text)), " ", _scores(reply))
            )


def _shortened(text: str, length: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[:length]}…"


def print_examples(console: Console, evaluation: Evaluation, n: int = 3) -> None:
    """Print `n` prompts with both replies side by side, differing ones first; what the head rejected is struck out."""
    is_styled = console.color_system is not None
    differing_first = sorted(evaluation.examples, key=lambda example: example.base.text == example.gated.text)
    for example in differing_first[:n]:
        sides = Table.grid(expand=True, padding=(0, 1))
        for _ in range(2):
            sides.add_column(ratio=1, overflow="fold")
        base = Panel(Group(Text(visible(example.base.text)), _scores(example.base)), title="base")
        gated = Panel(Group(gated_text(example.marks, is_styled=is_styled), _scores(example.gated)), title="gated")
        sides.add_row(base, gated)
        console.print(Text(visible(example.prompt[-1].content), style="bold"))
        console.print(sides)
    console.print(legend(is_styled=is_styled))


def gated_text(marks: Sequence[Mark], *, is_styled: bool = True) -> Text:
    """Return a gated reply with its marks, for a console; rejections by chance alone are left out.

    Args:
        marks: Marks of the reply's tokens.
        is_styled: True if the console shows colours. Without colours, rejected tokens are put in brackets: `[-a|b-]`.
    """
    text = Text()
    for mark in marks:
        rejected = [item for item in mark.rejected if item.is_by_head]
        shown = [struck_text(item) for item in rejected[:MOST_REJECTED]]
        more = f"+{len(rejected) - len(shown)}" if len(rejected) > len(shown) else ""
        if rejected and not is_styled:
            text.append(f"[-{'|'.join(filter(None, [*shown, more]))}-]")
        elif rejected:
            for struck in shown:
                text.append(struck, style="red strike")
            text.append(more, style="red dim")
        is_forced = mark.outcome in ("forced", "fallback")
        text.append(visible(mark.text), style="yellow underline" if is_forced else "green" if rejected else "")
    return text


def legend(*, is_styled: bool = True) -> Text:
    """Return the legend of `gated_text`."""
    if not is_styled:
        return Text("[-struck|out-] rejected by the head, for what follows")
    return Text.assemble(
        *(("struck", "red strike"), " rejected by the head  "),
        *(("green", "green"), " taken instead  "),
        *(("underlined", "yellow underline"), " taken with no choice left"),
    )


def _scores(reply: Reply) -> Text:
    return Text(visible("  ".join(f"{name} {score_text(value)}" for name, value in reply.scores.items())), style="dim")
