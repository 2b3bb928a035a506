"""`mara-tools generate`, and how replies are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from mara_integrations.cli.options import (
    AnyHeads,
    Device,
    Dtype,
    MaxNewTokens,
    Model,
    Seed,
    Stop,
    Strength,
    SystemPrompt,
    Temperature,
    TopK,
    TopP,
    given,
    head_source,
)
from mara_integrations.messages import Message, Prompt

if TYPE_CHECKING:
    from mara_integrations.engine.sequence import Generation
    from mara_integrations.runtime import MARAEngine


def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model; - reads it from standard input.")],
    model: Model = "smollm2",
    head: AnyHeads = None,
    strength: Strength = None,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    max_new_tokens: MaxNewTokens = 512,
    stop: Stop = None,
    seed: Seed = None,
    system_prompt: SystemPrompt = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    stream: Annotated[bool, typer.Option(help="Print each token as soon as it is certain.")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: text, tokens, and what the gate did.")
    ] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Add to it what the gate saw and did at each position.")
    ] = False,
    show_gate: Annotated[
        bool, typer.Option("--show-gate", help="Print the reply with the rejected candidates struck through.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Write one reply to standard output."""
    if show_gate and not head:
        raise typer.BadParameter("without --head there is no gate to show", param_hint="--show-gate")
    if prompt == "-":
        prompt = sys.stdin.read()
        prompt = prompt if raw else prompt.strip()
    from mara_integrations.runtime import MARAEngine
    from mara_integrations.settings import answer_report

    settings = given(strength=strength, top_k=top_k, top_p=top_p, stop=stop, seed=seed)
    settings |= {"temperature": temperature, "max_new_tokens": max_new_tokens}
    settings["trace"] = trace or show_gate
    engine = MARAEngine(model, head_source(head), device=device, dtype=dtype, system_prompt=system_prompt, **settings)
    said: Prompt = prompt if raw else [Message("user", prompt)]
    if as_json or trace:
        generation = engine.generate(said)
        answer = answer_report(generation, engine.model)
        print(
            json.dumps(
                {"text": generation.text, "prompt_tokens": generation.prompt_tokens, **answer}, ensure_ascii=False
            )
        )
    elif show_gate:
        show_verdicts(engine, said, engine.generate(said))
    elif stream:
        stream_reply(engine, said)
    else:
        print(engine.generate(said).text)


def stream_reply(engine: MARAEngine, prompt: Prompt, heard: list[str] | None = None, **overrides: Any) -> Generation:
    """Print a reply while it is written; `heard` gets its pieces."""
    from mara_integrations.evaluation.report import visible

    shown: Callable[[str], str] = visible if sys.stdout.isatty() else str  # a terminal obeys control characters
    with closing(engine.stream(prompt, **overrides)) as updates:
        for update in updates:
            if heard is not None:
                heard.append(update.text)
            print(shown(update.text), end="", flush=True)
            if update.generation is not None:
                print("" if update.generation.text.endswith("\n") else "\n", end="", flush=True)
                return update.generation
    raise AssertionError("a stream ends with its generation")


def show_verdicts(engine: MARAEngine, prompt: Prompt, generation: Generation) -> None:
    """Print a traced reply with what the head rejected, and how often it did."""
    from mara_integrations.evaluation.evaluate import token_marks
    from mara_integrations.evaluation.report import gated_text, stats_line

    console = Console(soft_wrap=True)
    marks = token_marks(engine.model.tokenizer, engine.request(prompt), generation)
    console.print(gated_text(marks, is_styled=console.color_system is not None))
    console.print(Text(stats_line(generation.stats, len(generation.token_ids)), style="dim"))
