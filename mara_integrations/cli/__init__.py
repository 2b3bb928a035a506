"""`mara-tools`: read the command line, call the library, print. What is heavy is imported inside the commands."""

from __future__ import annotations

from mara_integrations.cli.app import app, main
from mara_integrations.cli.chat import chat
from mara_integrations.cli.evaluate import evaluate_head
from mara_integrations.cli.generate import explain, generate
from mara_integrations.cli.heads import convert, inspect_head, merge
from mara_integrations.cli.serve import serve
from mara_integrations.cli.train import train

__all__ = ["app", "main"]

app.command("train")(train)
app.command("eval")(evaluate_head)
app.command("generate")(generate)
app.command("explain")(explain)
app.command("chat")(chat)
app.command("serve")(serve)
app.command("inspect")(inspect_head)
app.command("convert")(convert)
app.command("merge")(merge)
