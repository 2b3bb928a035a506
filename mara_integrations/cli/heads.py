"""`mara-tools inspect`, `convert` and `merge`: what is done with heads on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mara_integrations.cli.app import say
from mara_integrations.cli.options import head_source
from mara_integrations.errors import HeadError
from mara_integrations.files import check_writable
from mara_integrations.training.records.trackers import numbers

if TYPE_CHECKING:
    from mara_integrations.heads.head import MARAHead

Output = Annotated[Path, typer.Option(help="Folder of the new head.")]


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
    say(console, "Head", f"{head}, form {config.form}, {shape}, {num_parameters:,} parameters")
    say(console, "Model", config.base_model or "unknown")
    say(console, "Scale", f"strength 1 multiplies its score by {config.scale:.3g}")
    say(console, "Takes", f"top-k {config.top_k}, top-p {config.top_p:g}, at least {config.min_candidates} candidates")
    say(console, "Method", config.method or "unknown")
    for reward in config.rewards:
        say(console, "Reward", _reward_line(reward))
    say(console, "Data", config.data_fingerprint or "unknown")
    for name, value in numbers(config.metrics).items():
        say(console, "", f"{name} {value:.4g}")
    say(console, "Weights", loaded.fingerprint)


def convert(
    actor: Annotated[str, typer.Argument(help="A published .pth actor.")],
    output: Output,
    base_model: Annotated[str | None, typer.Option(help="Model that the actor was trained on, if known.")] = None,
) -> None:
    """Convert an actor of the paper's code (.pth) into a head's folder: safetensors, JSON, a model card.

    Examples:
      mara-tools convert actor.pth --output heads/published
      mara-tools convert actor.pth --output heads/published --base-model org/name
    """
    from mara_integrations.heads.head import MARAHead

    if Path(actor).is_dir():
        raise HeadError(f"{actor!r} is a folder", hint="heads in folders need no conversion; name a .pth file")
    check_writable(output)
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
) -> None:
    """Merge several heads into one that adds up their weighted corrections.

    Examples:
      mara-tools merge heads/voice heads/safety --output heads/both
      mara-tools merge heads/voice heads/safety=0.5 --output heads/both --top-k 40
    """
    from mara_integrations.heads.head import MARAHead
    from mara_integrations.heads.merge import merge_heads
    from mara_integrations.training.scoring.reward_files import copy_rewards

    check_writable(output)
    weights = head_source(heads) or {}
    sources = {name: MARAHead.from_pretrained(name) for name in weights}
    merged = merge_heads([(head, weights[name]) for name, head in sources.items()], top_k=top_k, top_p=top_p)
    copy_rewards(output, merged, sources)
    _written(merged, output)


def _written(head: MARAHead, output: Path) -> None:
    head.save_pretrained(output)
    say(Console(), "Head", f"{output}: form {head.config.form}, hidden size {head.config.hidden_size}")


def _reward_line(spec: dict[str, Any]) -> str:
    details = {name: value for name, value in spec.items() if name != "kind"}
    return f"{spec.get('kind', 'unknown')} {json.dumps(details, ensure_ascii=False)}"
