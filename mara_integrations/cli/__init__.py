"""`mara-tools`: read the command line, call the library, print. What is heavy is imported inside the commands."""

from __future__ import annotations

from mara_integrations.cli.app import app, main
from mara_integrations.cli.chat import chat
from mara_integrations.cli.evaluate import evaluate_head
from mara_integrations.cli.generate import generate
from mara_integrations.cli.train import train

__all__ = ["app", "main"]

app.command("train")(train)
app.command("eval")(evaluate_head)
app.command("generate")(generate)
app.command("chat")(chat)
