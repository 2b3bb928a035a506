"""`mara-tools demo`: train a head for a house style, measure it, ask through both frameworks."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mara_integrations.cli.app import app
from mara_integrations.demo import TEST, TRAIN, WORDS
from mara_integrations.files import check_writable

if TYPE_CHECKING:
    from mara_integrations import MARALLM

_QUESTION = "How do I keep indoor plants alive while on holiday?"
_TRAINING = ("--replies-each", "1", "--epochs", "10")
_QUICK_TRAINING = ("--max-replies", "24", "--correction-rounds", "0", "--epochs", "8")
_QUICK_EVALUATION = ("--limit", "8")


def demo(
    output: Annotated[Path, typer.Option(help="Folder that the head and the report are written to.")] = Path(
        "runs/house-style"
    ),
    model: Annotated[str, typer.Option(help="Base model: Hub id, folder, .gguf file or alias.")] = "smollm2",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Show the steps on a quarter of the data; the head gets too little to be good."),
    ] = False,
) -> None:
    """Train a head for a house style that never says "you", measure it, and ask it through LangChain and LlamaIndex.

    The data comes with the package: 96 prompts to train on and 72 others to judge by. On two CPU cores this takes
    some minutes. The model's weights are not changed; a head of a few MB refuses single tokens.

    Examples:
      mara-tools demo
      mara-tools demo --quick --output runs/first-look
    """
    console = Console(highlight=False)
    check_writable(output)
    from mara_integrations import MARAEngine

    report = output / "report.html"
    with MARAEngine(model).load():  # held open, so that all steps share the model in memory
        console.rule("1. Train a head")
        forbid = [flag for word in WORDS for flag in ("--forbid", word)]
        training = ["train", "--model", model, "--data", str(TRAIN), *forbid, "--output", str(output)]
        training += ["--max-reply-tokens", "40", "--eval-prompts", "0", *(_QUICK_TRAINING if quick else _TRAINING)]
        _run(console, training)

        console.rule("2. Compare replies without and with the head, to prompts it has never seen")
        evaluation = ["eval", "--model", model, "--head", str(output), "--data", str(TEST), "--max-new-tokens", "40"]
        evaluation += ["--examples", "4", "--report", str(report), *(_QUICK_EVALUATION if quick else ())]
        _run(console, evaluation)

        console.rule("3. Ask through LangChain and LlamaIndex")
        _ask(console, model, output)

    console.rule("Next")
    for command, purpose in (
        (f"mara-tools chat --head {shlex.quote(str(output))}", "talk with it; /base shows the model's own reply"),
        (f"mara-tools explain --head {shlex.quote(str(output))} 'How do I repot a cactus?'", "see what it rejects"),
        ("mara-tools train --help", "train on pairs, thumbs, a reward or a rule of your own"),
    ):
        console.print(f"[bold]{command}[/]\n    {purpose}", soft_wrap=True)
    console.print(f"[bold]{report}[/]\n    every reply and every rejected token", soft_wrap=True)


def _run(console: Console, arguments: list[str]) -> None:
    """Show a command and run it here; a process of its own would import torch and load the model again.

    Raises:
        typer.Exit: If the command fails; it has said why.
    """
    console.print(f"\n[bold green]$ mara-tools {shlex.join(arguments)}[/]\n", soft_wrap=True)
    if code := app(arguments, prog_name="mara-tools", standalone_mode=False):
        raise typer.Exit(code)


def _ask(console: Console, model: str, head: Path) -> None:
    """Print the answers of LangChain and of LlamaIndex to one question."""
    from mara_integrations import MARALLM

    llm = MARALLM(model=model, head=str(head), max_tokens=60)
    console.print(f"\n[bold]{_QUESTION}[/]\n")
    console.print("[cyan]LangChain[/]   ", end="")
    console.print(_ask_langchain(llm), markup=False)
    console.print("\n[cyan]LlamaIndex[/]  ", end="")
    console.print(_ask_llama_index(llm), markup=False)


def _ask_langchain(llm: MARALLM) -> str:
    """Ask one question through a chain of LangChain."""
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate

    chain = ChatPromptTemplate.from_messages([("human", "{question}")]) | llm | StrOutputParser()
    return chain.invoke({"question": _QUESTION})


def _ask_llama_index(llm: MARALLM) -> str:
    """Ask the same question through LlamaIndex."""
    from llama_index.core import PromptTemplate

    return llm.predict(PromptTemplate("{question}"), question=_QUESTION)
