"""`mara-tools serve`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from mara_integrations.cli.app import say
from mara_integrations.cli.options import Device, Dtype, Model, ModelKwargs, Quantise, SystemPrompt
from mara_integrations.errors import MissingExtraError
from mara_integrations.models.options import keyword_arguments


def serve(
    model: Model = "smollm2",
    head: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=HEAD",
            help="A head that requests may name, by model:NAME or the field head; may be repeated.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="MARA_API_KEY", help="What clients have to send.", show_default="none needed")
    ] = None,
    max_running: Annotated[
        int, typer.Option(min=1, help="Requests answered or waiting at once; more are refused with status 503.")
    ] = 256,
    system_prompt: SystemPrompt = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantise = None,
    model_kwargs: ModelKwargs = None,
) -> None:
    """Serve the model and its heads over HTTP, with OpenAI's interface."""
    from mara_integrations.heads.source import heads
    from mara_integrations.runtime import MARAEngine
    from mara_integrations.server import create_app

    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("serving needs uvicorn", hint="pip install 'mara-integrations[serve]'") from error

    named = {name: source for name, source in map(_named, head or ())}
    engine = MARAEngine(
        model,
        device=device,
        dtype=dtype,
        quantization=quantization,
        system_prompt=system_prompt,
        model_kwargs=keyword_arguments(model_kwargs or ()),
    ).load()
    for source in named.values():
        heads.get(source).check_fits(engine.model.hidden_size, engine.model.name, source)
    console = Console()
    say(console, "Models", ", ".join([model, *(f"{model}:{name}" for name in named)]))
    say(console, "Serves", f"http://{host}:{port}/v1")
    app = create_app(engine, named, name=model, api_key=api_key, max_running=max_running)
    uvicorn.run(app, host=host, port=port, log_level="warning")


def _named(text: str) -> tuple[str, str]:
    """A head under its own name where none is given."""
    name, has_name, source = text.partition("=")
    return (name, source) if has_name else (text, text)
