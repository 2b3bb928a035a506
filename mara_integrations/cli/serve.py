"""`mara-tools serve`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Literal

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console

from mara_integrations.cli.app import print_err, say
from mara_integrations.cli.config_file import ConfigFile
from mara_integrations.cli.options import Device, Dtype, Engine, Model, ModelKwargs, Quantise, require_extra
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.errors import ConfigError
from mara_integrations.models.options import keyword_arguments

_MODELS = "What is served"
_ACCESS = "Who may send requests"
_LIMITS = "How much at once"
_KEY_VARIABLE = "MARA_API_KEY"

LogLevel = Literal["debug", "info", "warning", "error"]


def serve(
    model: Model = None,
    head: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=HEAD",
            help="Head that requests may name, as model:NAME or in the field head. Without NAME=, it is called like "
            "its folder. May be repeated.",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the model in requests.", rich_help_panel=_MODELS, show_default="as in --model, without path"
        ),
    ] = None,
    system_prompt: Annotated[
        str | None,
        typer.Option(help="System prompt for conversations that have none.", rich_help_panel=_MODELS),
    ] = None,
    never: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT",
            help="Word, phrase, re:PATTERN or rule:NAME that no reply may have; requests can add to them. "
            "May be repeated.",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantise = None,
    model_kwargs: ModelKwargs = None,
    engine_name: Engine = "auto",
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.", rich_help_panel=_ACCESS)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.", rich_help_panel=_ACCESS)
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=_KEY_VARIABLE,
            help="Key that requests need, as Authorization: Bearer KEY; /health needs none.",
            show_default="none needed",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Web page that may send requests, such as https://chat.example (CORS); * allows all. May be repeated.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Host name that requests may carry beside localhost, for example behind a proxy; * allows all. May be "
            "repeated.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    max_running: Annotated[
        int,
        typer.Option(
            min=1,
            help="Replies running or waiting at once; more requests are refused with status 503.",
            rich_help_panel=_LIMITS,
        ),
    ] = 256,
    max_live: Annotated[
        int, typer.Option(min=1, help="Replies decoded together; the others wait.", rich_help_panel=_LIMITS)
    ] = 64,
    kv_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for keys and values of running replies, such as 8GiB; more requests wait.",
            show_default="a share of the free memory",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    prefix_cache_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for prompts that are kept for later ones with the same beginning; 0 keeps none.",
            show_default="some 8,000 tokens",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    head_cache_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory for the heads that stay loaded.", show_default="4GiB", rich_help_panel=_LIMITS
        ),
    ] = None,
    max_body_bytes: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Largest body of a request (status 413).", rich_help_panel=_LIMITS),
    ] = "4MiB",
    body_timeout: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds in which a body has to arrive (status 408).", rich_help_panel=_LIMITS),
    ] = 30.0,
    log_level: Annotated[
        LogLevel, typer.Option(help="Least severe news to log; info has a line for each request.")
    ] = "info",
    config_file: ConfigFile = None,
) -> None:
    """Serve the model and its heads over HTTP, as OpenAI's API does.

    Ctrl-C takes no more requests and waits for the replies that are running; a second Ctrl-C stops them.

    Examples:
      mara-tools serve --model smollm2 --head brand=heads/brand-voice
      mara-tools serve --model Qwen/Qwen3-0.6B --host 0.0.0.0 --api-key secret
    """
    require_extra("serve", "starlette", "uvicorn", "prometheus_client")

    from mara_integrations.heads.source import base_model_of, heads
    from mara_integrations.models.resolve import alias_of
    from mara_integrations.runtime import MARAEngine
    from mara_integrations.server import create_app
    from mara_integrations.server.listening import bind, is_loopback, port_of, serve
    from mara_integrations.server.names import named_head

    if api_key is None and _KEY_VARIABLE in os.environ:
        raise ConfigError(f"the API key in {_KEY_VARIABLE} is empty", hint="unset the variable to serve without a key")
    sizes = {"kv_bytes": kv_bytes, "prefix_cache_bytes": prefix_cache_bytes, "head_cache_bytes": head_cache_bytes}
    named: dict[str, str] = {}
    for short_name, source in map(named_head, head or ()):
        if short_name in named:
            raise ConfigError(f"two heads are called {short_name!r}", hint="give each a name, as --head NAME=HEAD")
        named[short_name] = source
    engine = MARAEngine(
        alias_of(base_model_of(list(named.values()))) if model is None and named else model,
        device=device,
        dtype=dtype,
        quantization=quantization,
        system_prompt=system_prompt,
        never=never,
        model_kwargs=keyword_arguments(model_kwargs or ()),
        engine=engine_name,
        limits=EngineLimits.of(
            max_live=max_live,
            max_waiting=max(max_running, EngineLimits().max_waiting),
            **{name: num_bytes(name, size) for name, size in sizes.items() if size is not None},
        ),
    )
    app = create_app(
        engine,
        named,
        name=name,
        api_key=api_key,
        max_running=max_running,
        max_body_bytes=num_bytes("max_body_bytes", max_body_bytes),
        body_timeout_s=body_timeout,
        allow_origins=allow_origin or (),
        allow_hosts=allow_host or (),
    )
    with ExitStack() as opened:
        sockets = bind(host, port)  # before the model is loaded: a port in use is said at once
        for one in sockets:
            opened.enter_context(one)
        if not is_loopback(host) and api_key is None:
            print_err(f"warning: without --api-key, whoever reaches {host} may use this server", "yellow")
        opened.enter_context(_log_to_stderr(log_level))
        engine.load()
        for source in named.values():
            heads.get(source).check_fits(
                engine.model.hidden_size, engine.model.name, source, fingerprint=engine.model.fingerprint
            )
        console = Console()
        say(console, "Models", ", ".join(app.state.names.all))
        say(console, "Serves", f"http://{f'[{host}]' if ':' in host else host}:{port_of(sockets)}/v1")
        serve(app, sockets)


def num_bytes(option: str, size: str) -> int:
    """Return the bytes of a size such as 4MiB.

    Raises:
        ConfigError: If it is not a size.
    """
    try:
        return int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError:
        name = option.replace("_", "-")
        raise ConfigError(f"--{name} {size!r} is not allowed", hint="a size, such as 512MiB or 8GiB") from None


@contextmanager
def _log_to_stderr(level: LogLevel) -> Iterator[None]:
    """Write our log and uvicorn's to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    wanted = getattr(logging, level.upper())
    loggers = {
        logging.getLogger("mara_integrations"): wanted,
        logging.getLogger("uvicorn"): wanted if level == "debug" else logging.ERROR,
    }
    before = [(logger, logger.level, logger.handlers) for logger in loggers]
    for logger, least in loggers.items():
        logger.setLevel(min(least, logger.level or least))  # --verbose and --debug may ask for more
        logger.handlers = [handler]
    try:
        yield
    finally:
        for logger, least, handlers in before:
            logger.setLevel(least)
            logger.handlers = handlers
