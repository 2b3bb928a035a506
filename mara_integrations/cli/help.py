"""The help of `mara-tools`: usage, purpose, options in groups, examples. It fits 80 columns and shortens no name."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperCommand

_CHOICES = re.compile(r"[<\[]([^<>\[\]]+(?:\|[^<>\[\]]+)+)[>\]]")
_RANGE = re.compile(r" (?:range|RANGE)(?=[>\]\s]|$)")
_AT_LEAST = re.compile(r"x>=([\d.]+)")
_WIDEST_NAME = 28
_BETWEEN = re.compile(r"([\d.]+)<=x<=([\d.]+)")


class Command(TyperCommand):
    """A command whose docstring may end in a section `Examples:`, one command a line, which its help shows as it is."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help: usage, purpose, arguments and options by panel, examples."""
        purpose, examples = split_examples(self.help or "")
        self.format_usage(ctx, formatter)
        write_text(formatter, purpose)
        write_panels(self, ctx, formatter)
        if examples:
            with formatter.section(_heading("Examples")):
                for line in examples:
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the first sentence of the purpose, for the list of commands."""
        del limit  # a sentence is wrapped, not cut
        first = " ".join((self.help or "").partition("\n\n")[0].split())
        return first.partition(". ")[0].removesuffix(".")


def split_examples(text: str) -> tuple[str, list[str]]:
    """Split a docstring into its prose and the lines of its section `Examples:`."""
    prose, _, examples = text.partition("\nExamples:\n")
    return prose.strip(), [line.rstrip() for line in textwrap.dedent(examples).splitlines() if line.strip()]


def write_text(formatter: Any, text: str) -> None:
    """Write paragraphs, indented and wrapped."""
    with formatter.indentation():
        for paragraph in text.split("\n\n"):
            formatter.write_paragraph()
            width = formatter.width - formatter.current_indent
            for line in textwrap.wrap(" ".join(paragraph.split()), width, break_on_hyphens=False):
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def write_panels(command: Any, ctx: Any, formatter: Any) -> None:
    """Write arguments and options, each under the heading of its `rich_help_panel`, in the order of declaration."""
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None:
            default = "Arguments" if parameter.param_type_name == "argument" else "Other options"
            panel = getattr(parameter, "rich_help_panel", None) or default
            panels.setdefault(panel, []).append(_row(parameter, *record))
    last = panels.pop("Other options", [])  # --help and the like
    for panel, rows in [*panels.items(), *([("Other options", last)] if last else [])]:
        with formatter.section(_heading(panel)):
            _write_rows(formatter, rows)


def write_commands(group: Any, ctx: Any, formatter: Any) -> None:
    """Write the commands with their first sentences, each under the heading of its `rich_help_panel`."""
    panels: dict[str, list[tuple[str, str]]] = {}
    for name, command in _visible(group, ctx):
        panel = getattr(command, "rich_help_panel", None)
        panels.setdefault(panel if isinstance(panel, str) else "Commands", []).append(
            (name, command.get_short_help_str())
        )
    width = max((len(name) for rows in panels.values() for name, _ in rows), default=0)
    for panel, rows in panels.items():
        with formatter.section(_heading(panel)):
            _write_rows(formatter, [(name.ljust(width), text) for name, text in rows])


def _write_rows(formatter: Any, rows: list[tuple[str, str]]) -> None:
    """Write names and texts in two columns; a long name has a line of its own, and no word is broken at a hyphen."""
    indent = formatter.current_indent
    column = min(max(len(name) for name, _ in rows), _WIDEST_NAME) + 2
    for name, text in rows:
        lines = textwrap.wrap(text, formatter.width - indent - column, break_on_hyphens=False) or [""]
        first = "" if len(name) > column - 2 else f"{'':{column - len(name)}}{lines.pop(0)}"
        formatter.write(f"{'':{indent}}{_styled(name, fg='cyan')}{first}".rstrip() + "\n")
        for line in lines:
            formatter.write(f"{'':{indent + column}}{line}\n")


def _visible(group: Any, ctx: Any) -> Iterator[tuple[str, Any]]:
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if command is not None and not command.hidden:
            yield name, command


def _row(parameter: Any, names: str, text: str) -> tuple[str, str]:
    """Return names and text of a parameter; a choice is listed in the text, where it wraps between words."""
    found = _CHOICES.search(names)
    if found:
        values = found[1].split("|")
        names = names.replace(found[0], names.split("--", 1)[-1].split()[0].replace("-", "_").upper())
        prose, bracket, extra = text.partition("  [")
        text = f"{prose} One of {', '.join(values)}.{bracket}{extra}"
    names = _RANGE.sub("", names)
    prose, bracket, extra = text.partition("  [")
    extra = extra.replace("default: (", "default: ").replace(")]", "]").replace("); ", "; ")
    extra = extra.replace("default: required", "required")
    extra = _AT_LEAST.sub(r"at least \1", _BETWEEN.sub(r"\1 to \2", extra))
    return names, f"{prose}{bracket}{extra}"


def _heading(text: str) -> str:
    return _styled(text, bold=True)


def _styled(text: str, **style: Any) -> str:
    return text if os.environ.get("NO_COLOR") else typer.style(text, **style)
