"""`mara-tools inspect`, `convert` and `merge`: what is done with heads on disk."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mara_integrations.cli.app import say
from mara_integrations.cli.options import head_source
from mara_integrations.errors import HeadError, OutputError, printable
from mara_integrations.files import check_writable
from mara_integrations.training.records.trackers import numbers

if TYPE_CHECKING:
    from mara_integrations.heads.head import MARAHead

Output = Annotated[Path, typer.Option(help="Folder of the new head.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a head in the output folder.")]


def inspect_head(
    head: Annotated[str, typer.Argument(help="Head: its folder, a published .pth actor, or a Hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Show what a head is, what it was trained on, and how well it did.

    Examples:
      mara-tools inspect runs/house-style
      mara-tools inspect heads/brand --json
    """
    from mara_integrations.heads.head import MARAHead

    loaded = MARAHead.from_pretrained(head)
    config = loaded.config
    num_parameters = sum(parameter.numel() for parameter in loaded.parameters())
    if as_json:
        whole = {**config.model_dump(mode="json"), "parameters": num_parameters, "fingerprint": loaded.fingerprint}
        print(json.dumps(whole, ensure_ascii=False, indent=2))
        return
    console = Console()
    wide, narrow = config.inner_sizes
    last = {"q": " features of state and candidate", "paper": " -> 2"}.get(config.form, " -> 1")
    shape = f"{config.hidden_size} -> {wide} -> {narrow}{last}"
    metrics = config.metrics
    origin = config.origin
    data = f"{(config.data_fingerprint or 'unknown')[:16]}"
    if origin is not None:
        data = f"{origin.data}, {origin.num_rows} rows and {origin.num_held_out_rows} held out, hash {data}"
    about = {
        "Head": f"{head}, form {config.form}, {shape}, {num_parameters:,} parameters",
        "Model": config.base_model or "unknown",
        "Scale": f"{config.scale:.3g}: at strength 1 the score is multiplied by it",
        "At temperature 0": f"strength {config.greedy_strength:.3g}, top-p {config.greedy_top_p or config.top_p:.3g}",
        "Candidates": f"top-k {config.top_k}, top-p {config.top_p:g}, at least {config.min_candidates}",
        "Method": config.method or "unknown",
        "Rewards": "\n".join(map(_reward_line, config.rewards)) or "none recorded",
        **({"Sentence": config.principle} if config.principle is not None else {}),
        **({"Missing answer": said} if (said := metrics.get("missing_answer")) else {}),
        "System prompt": config.system_prompt or "none",
        "Data": data,
        "Trained": f"{origin.date}, with {_versions(origin.versions)}" if origin is not None else "unknown",
        "Command": origin.command if origin is not None else "unknown",
        "Weights": loaded.fingerprint[:16],
    }
    _print_facts(console, about)
    _print_scores(console, metrics)


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def convert(
    actor: Annotated[str, typer.Argument(help="A published .pth actor.")],
    output: Output,
    base_model: Annotated[str | None, typer.Option(help="Model that the actor was trained on, if known.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert an actor of the paper's code (.pth) into a head's folder: safetensors, JSON, a model card.

    Examples:
      mara-tools convert actor.pth --output heads/published
      mara-tools convert actor.pth --output heads/published --base-model org/name
    """
    from mara_integrations.heads.head import MARAHead

    if Path(actor).is_dir():
        raise HeadError(f"{actor!r} is a folder", hint="heads in folders need no conversion; name a .pth file")
    check_free(output, overwrite=overwrite)
    head = MARAHead.from_pretrained(actor)
    head.config = head.config.model_copy(update={"base_model": base_model})
    _written(head, output)


def merge(
    heads: Annotated[
        list[str],
        typer.Argument(metavar="HEAD[=WEIGHT]...", help="Two heads or more."),
    ],
    output: Output,
    top_k: Annotated[int | None, typer.Option(min=1, help="Top-k of the new head, if theirs differ.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Top-p of the new head, if theirs differ.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge several heads into one that adds up their weighted corrections.

    Examples:
      mara-tools merge heads/voice heads/safety --output heads/both
      mara-tools merge heads/voice heads/safety=0.5 --output heads/both --top-k 40
    """
    from mara_integrations.heads.head import MARAHead
    from mara_integrations.heads.merge import merge_heads
    from mara_integrations.training.scoring.reward_files import copy_rewards

    check_free(output, overwrite=overwrite)
    weights = head_source(heads) or {}
    sources = {name: MARAHead.from_pretrained(name) for name in weights}
    merged = merge_heads([(head, weights[name]) for name, head in sources.items()], top_k=top_k, top_p=top_p)
    copy_rewards(output, merged, sources)
    _written(merged, output)


def check_free(output: Path, *, overwrite: bool) -> None:
    """Find out before the work whether a new head can be written.

    Raises:
        OutputError: If the folder can't be written to, or holds a head that is not to be replaced.
    """
    from mara_integrations.heads.folder import CONFIG_FILE

    if (output / CONFIG_FILE).exists() and not overwrite:
        raise OutputError(f"{str(output)!r} holds a head", hint="--overwrite replaces it; or name another folder")
    check_writable(output)


def _written(head: MARAHead, output: Path) -> None:
    head.save_pretrained(output)
    say(Console(), "Head", f"{output}: form {head.config.form}, hidden size {head.config.hidden_size}")
    model = "" if head.config.base_model else " --model MODEL"
    print(f"\nTry it\n  mara-tools chat --head {shlex.quote(str(output))}{model}")


def _print_scores(console: Console, metrics: Mapping[str, Any]) -> None:
    """Print what the training measured: per reward, then the figures of both sides, then what is left."""
    evaluation = metrics.get("evaluation")
    if isinstance(evaluation, Mapping):
        table = Table(title="On held-out prompts")
        for name in ("", "base", "gated"):
            table.add_column(name, justify="right" if name else "left", overflow="fold")
        rewards = evaluation.get("rewards")
        for name, found in rewards.items() if isinstance(rewards, Mapping) else ():
            values = found if isinstance(found, Mapping) else {}
            table.add_row(
                *(
                    Text(printable(t))
                    for t in (name, *map(_number, (values.get("base_mean"), values.get("gated_mean"))))
                )
            )
        base, gated = (side if isinstance(side := evaluation.get(key), Mapping) else {} for key in ("base", "gated"))
        for key in base:
            label = {"distinct_2": "distinct-2", "ended": "share of replies that came to an end"}.get(
                key, key.replace("_", " ")
            )
            table.add_row(*(Text(printable(t)) for t in (label, _number(base[key]), _number(gated.get(key)))))
        console.print(table)
    rest = {name: value for name, value in metrics.items() if name not in ("evaluation", "rows", "held_out_rows")}
    if others := {name.replace("_", " "): f"{value:.4g}" for name, value in numbers(rest).items()}:
        _print_facts(console, others)


def _print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Print each fact beside its name."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in facts.items():
        table.add_row(Text(printable(name)), Text(printable(text)))
    console.print(table)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _reward_line(spec: dict[str, Any]) -> str:
    details = {name: value for name, value in spec.items() if name != "kind"}
    return f"{spec.get('kind', 'unknown')} {json.dumps(details, ensure_ascii=False)}"
