"""`mara-tools`: read the command line, call the library, print. What is heavy is imported inside the commands."""

from __future__ import annotations

from mara_integrations.cli.app import app, main
from mara_integrations.cli.chat import chat
from mara_integrations.cli.demo import demo
from mara_integrations.cli.distil import distil
from mara_integrations.cli.evaluate import evaluate_head
from mara_integrations.cli.generate import explain, generate
from mara_integrations.cli.heads import convert, inspect_head, merge
from mara_integrations.cli.help import Command
from mara_integrations.cli.recipes import recipes
from mara_integrations.cli.serve import serve
from mara_integrations.cli.train import train

__all__ = ["app", "main"]

_MAKE, _USE, _KEEP = "Make a head and measure it", "Use a model, with or without a head", "Look after heads"

app.command("demo", cls=Command, rich_help_panel=_MAKE)(demo)
app.command("train", cls=Command, rich_help_panel=_MAKE)(train)
app.command("recipes", cls=Command, rich_help_panel=_MAKE)(recipes)
app.command("eval", cls=Command, rich_help_panel=_MAKE)(evaluate_head)
app.command("chat", cls=Command, rich_help_panel=_USE)(chat)
app.command("generate", cls=Command, rich_help_panel=_USE)(generate)
app.command("explain", cls=Command, rich_help_panel=_USE)(explain)
app.command("serve", cls=Command, rich_help_panel=_USE)(serve)
app.command("inspect", cls=Command, rich_help_panel=_KEEP)(inspect_head)
app.command("merge", cls=Command, rich_help_panel=_KEEP)(merge)
app.command("convert", cls=Command, rich_help_panel=_KEEP)(convert)
app.command("distil", cls=Command, rich_help_panel=_KEEP)(distil)
