"""Options for loading a model, as a command line or a file of settings gives them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml

from mara_integrations.errors import ConfigError

Quantization: TypeAlias = Literal["int8"]
# What runs the base model; `auto` is llama.cpp for some `.gguf` files, see `engine.choose_engine`, else transformers.
EngineName: TypeAlias = Literal["auto", "transformers", "llama.cpp", "vllm"]
# Those that show hidden states, which training keeps.
TrainingEngineName: TypeAlias = Literal["auto", "transformers", "llama.cpp"]

# Names the folder of the heads of vLLM engines in this process, for vLLM's own processes.
VLLM_HEADS_VARIABLE = "MARA_VLLM_HEADS"


def keyword_arguments(given: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """Arguments by name: `NAME=VALUE` texts whose values are read as YAML, or a mapping.

    Raises:
        ConfigError: If a text has no name, a value is broken, or can't be kept as JSON; or for an access token, which
            would be written down with the rest.
    """
    if isinstance(given, Mapping):
        arguments = dict(given)
    else:
        arguments = {}
        for text in given:
            name, has_value, value = text.partition("=")
            if not (name.isidentifier() and has_value):
                raise ConfigError(f"{text!r} is not of the form NAME=VALUE", hint="such as device_map=auto")
            try:
                arguments[name] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                problem = " ".join(str(error).split())
                raise ConfigError(
                    f"{text!r} has a broken value: {problem}", hint="values are YAML: auto, {a: 1}"
                ) from None
    if "token" in arguments:
        raise ConfigError("access tokens are not accepted here: they would be written to disk", hint="set HF_TOKEN")
    try:
        json.dumps(arguments)
    except TypeError as error:
        raise ConfigError(f"{arguments!r} can't be kept as JSON: {error}", hint="name plain values") from None
    return arguments


def read_yaml_settings(path: str | Path, known: Collection[str], command: str) -> dict[str, Any]:
    """Return the settings of a YAML file by name; hyphens in names are read as underscores.

    Args:
        path: The file.
        known: Names that are allowed.
        command: Command of `mara-tools` whose help lists them.

    Raises:
        ConfigError: If the file can't be read, or has a name that is not allowed.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:  # whose name is in errors
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} can't be read: {getattr(error, 'strerror', error)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{str(path)!r} is broken YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{str(path)!r} holds no settings", hint="one setting a line, as `name: value`")
    settings = {str(name).replace("-", "_"): value for name, value in content.items()}
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known)
            raise ConfigError(
                f"{str(path)!r}: {name!r} is not a setting",
                hint=f"did you mean {' or '.join(near)}?" if near else f"`mara-tools {command} --help` lists them",
            )
    return settings
