"""`mara-tools generate`, and how replies are printed."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from mara_integrations.cli.app import print_err
from mara_integrations.cli.options import REPLIES, asks_a_model, engine_for
from mara_integrations.messages import Prompt

if TYPE_CHECKING:
    from mara_integrations.engine.generation import Generation
    from mara_integrations.engine.tickets import Update
    from mara_integrations.runtime import MARAEngine

_OUTPUT = "Output"

Question = Annotated[str, typer.Argument(help="Message to the model; - reads it from standard input.")]
Raw = Annotated[
    bool,
    typer.Option("--raw", help="Continue the prompt as it is, without the chat template.", rich_help_panel=REPLIES),
]
Thoughts = Annotated[
    bool | None,
    typer.Option(
        "--thoughts/--no-thoughts",
        help="Show what a reasoning model thinks before it answers, dimmed and on standard error.",
        show_default="in a terminal",
        rich_help_panel=_OUTPUT,
    ),
]


@asks_a_model
def generate(
    prompt: Question,
    raw: Raw = False,
    stream: Annotated[
        bool, typer.Option(help="Print each token as soon as it is certain.", rich_help_panel=_OUTPUT)
    ] = True,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object: text, tokens, and what the gate did.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace",
            help="Print that object with the gate's candidates and decisions at each position.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    thoughts: Thoughts = None,
    *,
    asking: dict[str, Any],
) -> None:
    """Write one reply to standard output.

    Examples:
      mara-tools generate "How do I keep bread fresh?" --head runs/house-style
      mara-tools generate - --json --temperature 0.7 --seed 1 < question.txt
    """
    from mara_integrations.engine.tickets import Update

    engine, said = engine_for(asking, trace=trace), _read(prompt, raw)
    if as_json or trace:
        from mara_integrations.engine.answers import answer_report

        generation = engine.generate(said, raw=raw)
        answer = answer_report(generation, engine.model)
        reply = {"text": generation.text, "thoughts": generation.thoughts, "prompt_tokens": generation.prompt_tokens}
        print(json.dumps({**reply, **answer}, ensure_ascii=False))
        return
    printer = ReplyPrinter(thoughts)
    if stream:
        stream_reply(engine, said, printer, raw=raw)
    else:
        printer.show(Update.whole(engine.generate(said, raw=raw)))


@asks_a_model
def explain(prompt: Question, raw: Raw = False, *, asking: dict[str, Any]) -> None:
    """Write one reply, strike through the candidates that the head rejected, and count its decisions.

    Examples:
      mara-tools explain "How do I repot a cactus?" --head runs/house-style
      mara-tools explain "Who are you?" --head heads/brand --strength 2
    """
    if not asking["head"]:
        raise typer.BadParameter("without a head there is nothing to explain", param_hint="--head")
    engine, said = engine_for(asking, trace=True), _read(prompt, raw)
    show_verdicts(engine, said, engine.generate(said, raw=raw))


def _read(text: str, raw: bool) -> str:
    if text == "-":
        text = sys.stdin.read() if raw else sys.stdin.read().strip()
    return text


class ReplyPrinter:
    """Prints one reply: the answer on standard output, thoughts dimmed on standard error.

    Args:
        shows_thoughts: Whether to print thoughts; None prints them where the answer goes to a terminal.

    Attributes:
        text: The part of the answer that was printed.
    """

    def __init__(self, shows_thoughts: bool | None = None) -> None:
        from mara_integrations.evaluation.text import visible

        self.text = ""
        self._shows_thoughts = sys.stdout.isatty() if shows_thoughts is None else shows_thoughts
        self._escape = visible  # control characters that a terminal would obey
        self._console = Console(stderr=True, soft_wrap=True)
        self._is_thinking = False

    def show(self, update: Update) -> None:
        """Print what an update adds."""
        if update.thoughts and self._shows_thoughts:
            self._is_thinking = True
            self._console.print(Text(self._escape(update.thoughts), style="dim"), end="")
        if self._is_thinking and (update.text or update.generation is not None):
            self._is_thinking = False
            self._console.print("\n")
        self.text += update.text
        print(self._escape(update.text) if sys.stdout.isatty() else update.text, end="", flush=True)
        if update.generation is not None:
            print("" if self.text.endswith("\n") else "\n", end="", flush=True)
            if update.generation.finish_reason == "length" and update.generation.thoughts and not self.text:
                print_err("max_new_tokens ended the reply before its answer began: raise --max-new-tokens", "dim")


def stream_reply(engine: MARAEngine, prompt: Prompt, printer: ReplyPrinter, **overrides: Any) -> Generation:
    """Print a reply while it is written."""
    with closing(engine.stream(prompt, **overrides)) as updates:
        for update in updates:
            printer.show(update)
            if update.generation is not None:
                return update.generation
    raise AssertionError("a stream ends with its generation")


def show_verdicts(engine: MARAEngine, prompt: Prompt, generation: Generation) -> None:
    """Print a traced reply with what the head rejected, and how often it did."""
    from mara_integrations.evaluation.console import gated_text, legend
    from mara_integrations.evaluation.marks import token_marks
    from mara_integrations.evaluation.report import explained, stats_line

    console = Console(soft_wrap=True)
    marks = token_marks(engine.model.tokenizer, engine.request(prompt), generation)
    is_styled = console.color_system is not None
    console.print(gated_text(marks, is_styled=is_styled))
    console.print(legend(is_styled=is_styled), style="dim")
    counts = stats_line(generation.stats, len(generation.token_ids))
    meanings = "; ".join(f"{word}: {meaning}" for word, meaning in explained(counts).items())
    console.print(Text(counts, style="dim"))
    if meanings:
        console.print(Text(meanings, style="dim"))
