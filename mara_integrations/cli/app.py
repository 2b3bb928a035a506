"""The app `mara-tools`, what goes to its console, and what becomes of errors and warnings."""

from __future__ import annotations

import io
import sys
import warnings
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from mara_integrations import __version__
from mara_integrations.errors import MaraError, printable
from mara_integrations.models import ranks

INTERRUPTED = 130  # as shells have it: 128 + SIGINT


class _Commands(TyperGroup):
    """Tells what goes wrong in any command: one line and a hint on stderr, no traceback without `--debug`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Understand `--debug` behind a command too."""
        if "--debug" in (args[: args.index("--")] if "--" in args else args):
            args = args.copy()
            args.remove("--debug")
            args = ["--debug", *args]
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                raise typer.Exit(INTERRUPTED) from None
            except Exception as error:
                # typer's own errors say how to exit; it also knows what to do when nobody reads our output any more
                is_typers = hasattr(error, "exit_code") or isinstance(error, typer.Abort | BrokenPipeError)
                if is_typers or ctx.params.get("debug"):
                    raise
                show_error(error)
                raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of `mara-tools`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if ranks.has_others():  # now: a command reads standard input and speaks before it loads a model, and one does so
        ranks.join()
    app()


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"mara-tools {__version__}")
        raise typer.Exit


@app.callback()
def _mara_tools(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    """Align the model you already run: train a tiny head that accepts or rejects each token, measure it, use it."""


# --- what goes to the console ---


def say(console: Console, label: str, text: str) -> None:
    """Print one line of news: no markup, no line breaks of ours, control characters escaped."""
    console.print(Text.assemble((f"{label:<8}", "bold"), printable(text)), soft_wrap=True)


def dim(text: str) -> None:
    """Print something that is beside the point."""
    Console(soft_wrap=True).print(Text(printable(text), style="dim"))


def print_err(text: str, style: str = "") -> None:
    """Print one line on stderr, whatever the text."""
    Console(stderr=True, soft_wrap=True).print(Text(printable(" ".join(text.splitlines())), style=style))


def show_error(error: Exception) -> None:
    """What was wrong, and what to do about it."""
    if isinstance(error, MaraError):
        message, hint = error.message, error.hint
    else:
        message, hint = f"unexpected {type(error).__name__}: {error}", "run again with --debug to see where"
    print_err(f"error: {message}", "bold red")
    if hint:
        print_err(f"hint: {hint}", "dim")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print_err(f"warning: {message}", "yellow")
