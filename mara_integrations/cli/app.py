"""The app `mara-tools`, what goes to its console, and what becomes of errors and warnings."""

from __future__ import annotations

import difflib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from mara_integrations import __version__
from mara_integrations.cli.help import write_commands, write_panels, write_text
from mara_integrations.errors import MaraError, printable
from mara_integrations.models import ranks

INTERRUPTED = 130  # as shells have it: 128 + SIGINT


class _Commands(TyperGroup):
    """The commands of `mara-tools`. An error is one line and a hint on stderr; `--debug` adds its traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Understand `--debug` and `--verbose` behind a command too."""
        ours = args[: args.index("--")] if "--" in args else args
        flags = [flag for flag in ("--debug", "--verbose") if flag in ours]
        args = [*flags, *(arg for arg in ours if arg not in flags), *args[len(ours) :]]
        with _usage_errors_shown():
            parsed: list[str] = super().parse_args(ctx, args)
        return parsed

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with warnings.catch_warnings(), _usage_errors_shown():
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

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write what `mara-tools` is, its commands by purpose, and its own options."""
        self.format_usage(ctx, formatter)
        write_text(formatter, self.help or "")
        write_commands(self, ctx, formatter)
        write_panels(self, ctx, formatter)


@contextmanager
def _usage_errors_shown() -> Iterator[None]:
    """Print a mistake in the command line as every other error: one line, and a hint."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "format_message") or type(error).__name__ == "NoArgsIsHelpError":
            raise
        context = getattr(error, "ctx", None)
        hint = f"`{context.command_path} --help` lists what there is" if context is not None else None
        message = _usage_message(error)
        near = getattr(error, "possibilities", None)
        if type(error).__name__ == "NoSuchOption" and context is not None:
            known = [name for parameter in context.command.get_params(context) for name in parameter.opts]
            near = difflib.get_close_matches(error.option_name, known, n=2)  # type: ignore[attr-defined]
        elif "No such command" in message and context is not None:
            near = difflib.get_close_matches(message.split("'")[1], context.command.list_commands(context), n=2)
        if near:
            hint = f"did you mean {' or '.join(near)}?"
        print_err(f"error: {message[:1].lower()}{message[1:].removesuffix('.')}", "bold red")
        if hint:
            print_err(f"hint: {hint}", "dim")
        raise typer.Exit(getattr(error, "exit_code", 2)) from None


def _usage_message(error: Any) -> str:
    """Return what typer says of a mistake, without its own hints, and with the value that pydantic refused."""
    message = str(error.format_message()).partition(" (Possible options")[0].partition(" Did you mean")[0]
    if isinstance(error.__cause__, ValidationError):
        value = error.__cause__.errors()[0]["input"]
        message = message.replace("Value error, ", "").replace("Input should", f"{value!r} should")
    return message


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> None:
    """Entry point of `mara-tools`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):  # a prompt that is not UTF-8 is refused as such, in every locale
        sys.stdin.reconfigure(errors="surrogateescape")
    if ranks.has_others():  # now: a command reads standard input and speaks before it loads a model, and one does so
        ranks.join()
    app(prog_name="mara-tools")


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"mara-tools {__version__}")
        raise typer.Exit


@app.callback()
def _mara_tools(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log to stderr what is loaded and chosen.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Log every detail, and show the whole traceback of an error.")
    ] = False,
) -> None:
    """Align the model you already run: train a tiny head that accepts or rejects each token, measure it, use it.

    `mara-tools COMMAND --help` explains a command and shows examples. --verbose and --debug may stand behind it, too.
    """
    if verbose or debug:
        _log_to_stderr(logging.DEBUG if debug else logging.INFO)


def _log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("mara_integrations")
    logger.setLevel(level)
    logger.handlers = [handler]
    logger.propagate = False


# --- what goes to the console ---


def say(console: Console, label: str, text: str) -> None:
    """Print one line of news: no markup, no line breaks of ours, control characters escaped."""
    console.print(Text.assemble((f"{label:<7} ", "bold"), printable(text)), soft_wrap=True)


def dim(text: str) -> None:
    """Print something that is beside the point."""
    Console(soft_wrap=True).print(Text(printable(text), style="dim"))


def print_err(text: str, style: str = "") -> None:
    """Print one line on stderr, whatever the text."""
    Console(stderr=True, soft_wrap=True).print(Text(printable(" ".join(text.splitlines())), style=style))


def show_error(error: Exception) -> None:
    """Print what was wrong, and what to do about it."""
    if isinstance(error, MaraError):
        message, hint = error.message, error.hint
    else:
        message, hint = f"unexpected {type(error).__name__}: {error}", "run again with --debug to see where"
    print_err(f"error: {message}", "bold red")
    if hint:
        print_err(f"hint: {hint}", "dim")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print_err(f"warning: {message}", "yellow")
