"""`mara-tools distil`."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mara_integrations.cli.app import say
from mara_integrations.cli.heads import Overwrite, check_free
from mara_integrations.cli.options import Column, DataFormat, Device, Dtype, Model, SkipBadRows, data_flags
from mara_integrations.progress import ConsoleReporter

HEADS, DATA, REPLIES = "Heads", "Data", "Replies to learn from"


def distil(
    head: Annotated[
        str,
        typer.Option(help="Head to distil: its folder, a published .pth actor, or a Hub id.", rich_help_panel=HEADS),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the new head.", rich_help_panel=HEADS)],
    data: Annotated[
        Path, typer.Option(help="Prompts that the head replies to, in any form that train takes.", rich_help_panel=DATA)
    ],
    model: Model = None,
    format: DataFormat = "auto",
    column: Column = None,
    skip_bad_rows: SkipBadRows = False,
    max_replies: Annotated[
        int,
        typer.Option(min=2, help="Replies of the head to learn from; a fifth is held out.", rich_help_panel=REPLIES),
    ] = 128,
    max_reply_tokens: Annotated[
        int, typer.Option(min=2, help="Length of these replies, in tokens.", rich_help_panel=REPLIES)
    ] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the replies and of the fit.", rich_help_panel=REPLIES)] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Turn a head of any form into one of the q form, which needs no forward for the candidates it judges.

    Examples:
      mara-tools distil --head heads/voice --data prompts.jsonl --output heads/q

      mara-tools distil --head actor.pth --data prompts.csv --output heads/q
    """
    from mara_integrations.data import column_mapping, read_prompts
    from mara_integrations.heads.head import MARAHead
    from mara_integrations.heads.source import base_model_of
    from mara_integrations.messages import Conversation
    from mara_integrations.models.load import ModelSpec, load_model
    from mara_integrations.models.resolve import alias_of
    from mara_integrations.runtime import backend_of
    from mara_integrations.training.distil import distil as distil_head
    from mara_integrations.training.scoring.reward_files import copy_rewards

    check_free(output, overwrite=overwrite)
    print(f"Distilling {head} into {output}, from its replies to {data}", flush=True)
    rows = read_prompts(data, format, columns=column_mapping(column or ()), skip_bad_rows=skip_bad_rows).rows
    teacher = MARAHead.from_pretrained(head)
    loaded = load_model(ModelSpec(model or alias_of(base_model_of(teacher)), device, dtype))
    teacher.check_fits(loaded.hidden_size, loaded.name, head)
    prompts = list(dict.fromkeys(Conversation(row.prompt, row.tools) for row in rows))[:max_replies]
    console = Console()
    found, report = distil_head(
        teacher.to(loaded.device).eval(),
        loaded,
        backend_of(loaded),
        prompts,
        max_reply_tokens=max_reply_tokens,
        seed=seed,
        reporter=ConsoleReporter(console),
    )
    found.config = found.config.model_copy(update={"metrics": {"distil": asdict(report)}})
    copy_rewards(output, found, {head: teacher})
    found.save_pretrained(output)
    say(console, "Head", f"{output}: form q, hidden size {found.config.hidden_size}")
    say(
        console,
        "Held out",
        f"at {report.positions} positions, KL from the teacher {report.kl:.3f} nats (the base model's "
        f"{report.base_kl:.3f}); the same token in {report.greedy_agreement:.0%} greedily, in "
        f"{report.sampled_agreement:.0%} with the same random number",
    )
    new = shlex.quote(str(output))
    print(
        "\nTry it\n"
        f"  mara-tools chat --head {new}\n"
        f"  mara-tools eval --head {new} --compare {shlex.quote(head)} "
        + shlex.join(data_flags(data, format, column or (), skip_bad_rows=skip_bad_rows))
    )
