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
from mara_integrations.cli.options import data_flags, takes
from mara_integrations.data.principles import VARIED_PROMPTS
from mara_integrations.models import ranks
from mara_integrations.progress import ConsoleReporter
from mara_integrations.training.config import GROUPS, TrainConfig, read_settings
from mara_integrations.training.recipes import with_recipe


@takes(TrainConfig, GROUPS, required=("output",))
def train(
    *,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="FILE", help="YAML file with any of these settings; options given here replace them."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, estimate time and memory, write nothing.")
    ] = False,
    **options: Any,
) -> None:
    """Train a head on pairs, labelled replies, a reward, forbidden words, a sentence, a teacher, or a recipe.

    All but a sentence, a teacher and a recipe need --data.

    Of every prompt in the data, some are held out: the head is not fitted on them, and is evaluated on them at the end.
    An interrupted run continues where it was when the same command is given again.

    Examples:
      mara-tools train --data prefs.jsonl --output heads/brand-voice
      mara-tools train --recipe warm --output heads/warm
    """
    config = _settings(config_file, options)
    if dry_run:
        from mara_integrations.training import dry_run as trial

        trial.dry_run(config, ConsoleReporter(Console()))
        print("Everything is in order; nothing was written.")
        return
    source = config.data or "prompts of many kinds"
    print(f"Training a head for {config.model} on {source}, into {config.output}", flush=True)
    console = Console()
    try:
        from mara_integrations.evaluation.console import print_summary
        from mara_integrations.training import run

        result = run.train(config, reporter=ConsoleReporter(console))
    except KeyboardInterrupt:
        print_err("interrupted: finished work is stored, and the same command continues from there")
        raise typer.Exit(INTERRUPTED) from None
    if result.evaluation is not None:
        print_summary(console, result.evaluation)
    say(console, "Head", f"{result.output}: scale {result.head.config.scale:.3g}")
    _show_next_steps(config)


def _settings(file: Path | None, options: dict[str, Any]) -> TrainConfig:
    """Return the settings of the options, and of the file where there is no option."""
    settings = read_settings(file) if file is not None else {}
    settings |= {name: value for name, value in options.items() if value not in (None, [])}
    settings = with_recipe(settings)
    has_own_prompts = any(settings.get(name) for name in ("principle", "principle_file", "teacher"))
    if settings.get("output") is None:
        raise typer.BadParameter("name a folder for the head", param_hint="--output")
    if settings.get("data") is None and not has_own_prompts:
        needed = "name a file of preferences or prompts; only --principle, --teacher and --recipe do without"
        raise typer.BadParameter(needed, param_hint="--data")
    return TrainConfig.of(**settings)


def _show_next_steps(config: TrainConfig) -> None:
    given = {name: getattr(config, name) for name in ("system_prompt", "device", "dtype", "quantization", "engine")}
    used = {"model": config.model, "head": str(config.output)}
    used |= {name: value for name, value in given.items() if value not in (None, "auto")}
    flags = " ".join(f"--{name.replace('_', '-')} {shlex.quote(value)}" for name, value in used.items())
    for name, value in config.model_kwargs.items():
        flags += f" --model-kwargs {shlex.quote(f'{name}={json.dumps(value)}')}"
    data = ["--data", str(config.prompts)]
    if config.prompts is None:
        source = config.data or VARIED_PROMPTS
        data = data_flags(source, config.format, config.column, skip_bad_rows=config.skip_bad_rows)
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
