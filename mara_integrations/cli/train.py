"""`mara-tools train`."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mara_integrations.cli.app import INTERRUPTED, print_err, say
from mara_integrations.cli.options import takes
from mara_integrations.models import ranks
from mara_integrations.progress import ConsoleReporter
from mara_integrations.training.config import TrainConfig, read_settings


@takes(
    TrainConfig,
    common=("model", "data", "output", "reward", "forbid", "system_prompt", "method", "seed", "device", "dtype"),
)
def train(
    *,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="YAML with any of these settings; those given here win."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, estimate time and memory, and stop; writes nothing.")
    ] = False,
    **options: Any,
) -> None:
    """Train a head on preference pairs, on labelled replies, or on prompts with a reward or forbidden words.

    Examples:
      mara-tools train --data prefs.jsonl --output heads/brand-voice
      mara-tools train --data prompts.jsonl --forbid refund --output heads/no-refund
    """
    config = _settings(config_file, options)
    if dry_run:
        from mara_integrations.training.dry_run import rehearse

        rehearse(config, ConsoleReporter(Console()))
        print("Everything is in order; nothing was written.")
        return
    print(f"Training a head for {config.model} on {config.data}, into {config.output}", flush=True)
    console = Console()
    try:
        from mara_integrations.evaluation.report import print_summary
        from mara_integrations.training import run

        result = run.train(config, ConsoleReporter(console))
    except KeyboardInterrupt:
        print_err("interrupted: the replies gathered so far are kept, and the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None
    if result.evaluation is not None:
        print_summary(console, result.evaluation)
    say(console, "Head", f"{result.output}: scale {result.head.config.scale:.3g}")
    _show_next_steps(config)


def _settings(file: Path | None, options: dict[str, Any]) -> TrainConfig:
    """What the flags say, and of the rest what the file says."""
    settings = read_settings(file) if file is not None else {}
    settings |= {name: value for name, value in options.items() if value not in (None, [])}
    for name in ("data", "output"):
        if name not in settings:
            raise typer.BadParameter("it is needed, here or in a file for --config", param_hint=f"--{name}")
    return TrainConfig.of(**settings)


def _show_next_steps(config: TrainConfig) -> None:
    given = {name: getattr(config, name) for name in ("system_prompt", "device", "dtype", "quantization")}
    used = {"model": config.model, "head": str(config.output)}
    used |= {name: value for name, value in given.items() if value not in (None, "auto")}
    flags = " ".join(f"--{name.replace('_', '-')} {shlex.quote(value)}" for name, value in used.items())
    for name, value in config.model_kwargs.items():
        flags += f" --model-kwargs {shlex.quote(f'{name}={json.dumps(value)}')}"
    data = ["--data", str(config.data), *(flag for column in config.column for flag in ("--column", column))]
    data += [] if config.format == "auto" else ["--format", config.format]
    data += ["--skip-bad-rows"] if config.skip_bad_rows else []
    keywords = ", ".join(f"{name}={value!r}" for name, value in used.items())
    keywords += f", model_kwargs={config.model_kwargs!r}" if config.model_kwargs else ""
    starts = os.environ.get("LOCAL_WORLD_SIZE", "2")
    tools = f"torchrun --nproc-per-node {starts} -m mara_integrations" if ranks.has_others() else "mara-tools"
    print(
        "\nTry it\n"
        f"  {tools} chat {flags}\n"
        f"  {tools} eval {flags} {shlex.join(data)} --report report.html\n"
        "\n"
        "  from mara_integrations import MARALLM\n"
        f"  llm = MARALLM({keywords})\n"
        '  print(llm.complete("What can you do?").text)  # or prompt | llm | parser, index.as_query_engine(llm=llm)'
    )
