"""What decides the head of a run, so that work of an interrupted run is only used for the very same head.

Two runs with equal identities end with the same head. Where an interrupted run, or a finished head, has another one,
the differences can be named.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from typing_extensions import Self

import mara_integrations
from mara_integrations.files import write_atomically
from mara_integrations.heads.config import Origin
from mara_integrations.models import ranks
from mara_integrations.models.load import LoadedModel
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.plan import Plan

IDENTITY_FILE = "identity.json"
_FOLDERS = re.compile(r"^.*[/\\](?=[^/\\]+\.py:)|(?<=[?&]rubric=)[^&]*[/\\]")  # before the file of a reward
_NOT_IN_COMMAND = {"overwrite", "push_to_hub", "public", "track"}
_MODELS = ("model", "teacher", "teacher_base")  # settings that may be a path or a name of the Hub
MODEL = "weights of the model"
VERSION = "version of mara_integrations"


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything that decides a head.

    Attributes:
        settings: Settings of the run that decide the head, by name.
        hashes: Versions and hashes of data, reward and model, by a name that a message can use.
    """

    settings: Mapping[str, Any]
    hashes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: TrainConfig, plan: Plan) -> Self:
        """Return the identity of a run, as far as it is known before the model is loaded."""
        return cls(config.described(), {VERSION: mara_integrations.__version__, **plan.hashes})

    def with_model(self, model: LoadedModel, others: Mapping[str, str] | None = None) -> Identity:
        """Return the identity with the model's weights, and with hashes of other models by their role in the run."""
        beside = {f"weights of the {name}": hashed for name, hashed in (others or {}).items()}
        return Identity(self.settings, {**self.hashes, MODEL: model_fingerprint(model), **beside})

    def origin(self, config: TrainConfig, plan: Plan) -> Origin:
        """Return what a head's config tells of its training."""
        return Origin(
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=_command(config),
            data=printable(plan.train.path.name),
            num_rows=len(plan.train),
            num_held_out_rows=len(plan.held_out),
            versions={
                "mara_integrations": mara_integrations.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "Python": platform.python_version(),
            },
            hashes=dict(self.hashes),
        )

    @property
    def fingerprint(self) -> str:
        """Hash of everything."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: Identity) -> list[str]:
        """Return in words what another identity has otherwise; what only one of them knows is left out."""
        changed = [
            f"{name} was {other.settings[name]!r}, is {self.settings[name]!r}"
            for name in self.settings.keys() & other.settings.keys()
            if self.settings[name] != other.settings[name]
        ]
        changed += [
            f"the {name} was {other.hashes[name]}, is {self.hashes[name]}" if name == VERSION else f"the {name} changed"
            for name in self.hashes.keys() & other.hashes.keys()
            if self.hashes[name] != other.hashes[name]
        ]
        return sorted(changed)

    def write(self, folder: Path) -> None:
        """Write the identity into the folder of a run's stored work."""
        write_atomically(folder / IDENTITY_FILE, json.dumps(asdict(self), indent=1), private=True)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return the identity of a run's stored work; None if there is none."""
        try:
            content = json.loads((folder / IDENTITY_FILE).read_text(encoding="utf-8"))
            return cls(dict(content["settings"]), dict(content["hashes"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _command(config: TrainConfig) -> str:
    """Return the command that trains such a head, with the names of files instead of their paths."""
    words = ["mara-tools", "train"]
    usual = TrainConfig.of(output=config.output, recipe=config.recipe)
    for name in TrainConfig.model_fields:
        value = getattr(config, name)
        is_usual = value is None if name in ("output", "recipe") else value == getattr(usual, name)
        if name in _NOT_IN_COMMAND or is_usual:
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option.removeprefix('--')}")
        elif isinstance(value, tuple):
            words += [word for each in value for word in (option, _FOLDERS.sub("", each))]
        elif isinstance(value, dict):
            words += [word for key, each in value.items() for word in (option, f"{key}={json.dumps(each)}")]
        else:
            is_path = isinstance(value, Path) or (name in _MODELS and Path(value).exists())
            words += [option, Path(value).name if is_path else str(value)]
    return printable(shlex.join(words), "\n\t")


def printable(text: str, allowed: str = "") -> str:
    """Return a text of bounded length in which each control character is a question mark."""
    return "".join(c if c.isprintable() or c in allowed else "?" for c in text)[:1000]


def model_fingerprint(model: LoadedModel) -> str:
    """Hash a model's name, type and weights, by a sample of every tensor: a fine-tuned copy differs."""
    digest = hashlib.sha256(f"{model.name} {model.revision} {model.dtype}".encode())
    if model.engine == "llama.cpp":
        digest.update(model.model.sample())
        return digest.hexdigest()[:32]
    for name, tensor in model.model.state_dict().items():
        flat = ranks.own_part(tensor).detach().flatten()
        sample = flat[:: max(1, len(flat) // 256)]
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(sample.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:32]
