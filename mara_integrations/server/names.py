"""The names of the model and its heads in requests, which stand for their locations on this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mara_integrations.errors import ConfigError
from mara_integrations.heads.source import OneHead

_NAME = re.compile(r"[^\s:=/\\\x00-\x1f]+")


@dataclass(frozen=True)
class ServedNames:
    """The names that are served.

    Attributes:
        model: Name of the base model.
        heads: Heads by name; `model:name` is the base model with that head.
    """

    model: str
    heads: Mapping[str, OneHead] = field(default_factory=dict)

    @property
    def all(self) -> list[str]:
        """The base model, and it with each head."""
        return [self.model, *(f"{self.model}:{head}" for head in self.heads)]

    def public(self, message: str, model_path: str) -> str:
        """Return an error's message with names in place of the paths of the model and the heads."""
        places = {model_path: self.model, **{str(source): name for name, source in self.heads.items()}}
        for place, name in places.items():
            message = message.replace(repr(place), repr(name))
        return message


def model_name(model: Any) -> str:
    """Return the name under which a model is served: of a file or folder its own name, else what the user calls it."""
    if not isinstance(model, str | Path):
        return "model"
    path = Path(model).expanduser()
    if not path.exists():
        return str(model)
    return path.stem if path.is_file() else path.resolve().name


def named_head(text: str) -> tuple[str, str]:
    """Return name and source of `NAME=HEAD`; a head without a name is called like its folder or file.

    Raises:
        ConfigError: If the name is empty or has characters that a model's name can't have.
    """
    name, has_name, source = text.partition("=")
    if not has_name:
        source = text
        path = Path(text).expanduser()
        name = path.stem if path.suffix == ".pth" else path.resolve().name if path.exists() else path.name
    if not _NAME.fullmatch(name) or not source:
        raise ConfigError(f"--head {text!r} is not allowed", hint="NAME=HEAD, such as brand=heads/brand-voice")
    return name, source
