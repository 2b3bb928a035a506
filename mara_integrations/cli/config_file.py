"""`--config FILE`: a YAML file with the options of a command; options on the command line replace those of the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mara_integrations.errors import ConfigError
from mara_integrations.models.options import read_yaml_settings


def _take(context: typer.Context, file: Path | None) -> Path | None:
    """Make a file's settings the defaults of the command's options, which are read after this one."""
    if file is None:
        return None
    options = {
        flag.removeprefix("--").replace("-", "_"): parameter
        for parameter in context.command.params
        if parameter.param_type_name == "option"
        for flag in parameter.opts
        if flag.startswith("--") and flag not in ("--config", "--help")
    }
    settings = read_yaml_settings(file, options, str(context.info_name))
    context.default_map = {
        **(context.default_map or {}),
        **{str(options[name].name): _value(file, name, value, options[name]) for name, value in settings.items()},
    }
    return file


def _value(file: Path, name: str, value: Any, option: Any) -> Any:
    """Return a value in the form that the command line has it.

    Raises:
        ConfigError: If there are several values for an option that takes one.
    """
    if option.multiple:
        if isinstance(value, Mapping):
            return [f"{key}={_text(each)}" for key, each in value.items()]
        return value if value is None else [_text(each) for each in (value if isinstance(value, list) else [value])]
    if isinstance(value, list | Mapping):
        raise ConfigError(f"{str(file)!r}: {name}={value!r} is not allowed", hint="this setting takes one value")
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        is_eager=True,
        callback=_take,
        help="YAML file with any of these options, such as temperature: 0.7; options given here replace them.",
    ),
]
