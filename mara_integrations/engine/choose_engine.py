"""Choose the engine of a model where `engine="auto"` leaves it open: llama.cpp for `.gguf` files, else transformers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from typing_extensions import Self

from mara_integrations.engine.limits import EngineLimits
from mara_integrations.errors import MissingExtraError, ModelError
from mara_integrations.models.devices import choose_device
from mara_integrations.models.llama_cpp.library import library
from mara_integrations.models.llama_cpp.options import MAX_LIVE, LlamaCppOptions
from mara_integrations.models.load import LoadedModel, ModelSpec

_log = logging.getLogger(__name__)

# Devices of transformers that llama.cpp has too. It can't be held to one of several GPUs by a device's name.
_DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine that runs a model, and the reason.

    Attributes:
        name: `transformers`, `llama.cpp`, `vllm` or `server`.
        reason: Why, as a clause.
    """

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts about a machine that decide on the engine of a `.gguf` file.

    Attributes:
        gpu: Name of the GPU device that torch sees, `cuda` or `mps`; None without one.
        no_llama_cpp: Why llama.cpp can't run here, as a clause; None where it can.
        has_gpu_offload: True if the installed llama.cpp was built with GPU support.
    """

    gpu: str | None = None
    no_llama_cpp: str | None = None
    has_gpu_offload: bool = False

    @classmethod
    def this(cls) -> Self:
        """Return the facts about this machine; loads llama.cpp's library where it is installed."""
        device = choose_device("auto").type
        gpu = None if device == "cpu" else device
        try:
            return cls(gpu, has_gpu_offload=bool(library().llama_supports_gpu_offload()))
        except MissingExtraError:
            return cls(gpu, "llama.cpp is not installed")
        except ModelError as error:
            return cls(gpu, error.message)


def choose_engine(
    spec: ModelSpec, limits: EngineLimits | None = None, machine: Callable[[], Machine] = Machine.this
) -> EngineChoice:
    """Return the engine that runs a model; nothing is looked up on the Hub or loaded.

    `auto` is llama.cpp for a `.gguf` file that is named by its path, if llama.cpp is installed, has the use of the GPU
    where there is one, and no setting is one of transformers alone. Everything else runs on transformers, the alias
    `smollm2` included: its replies do not depend on what else is installed. All forms of heads run on both.

    Args:
        spec: The model, and how it is loaded.
        limits: Limits of the engine.
        machine: Returns the facts about the machine; called only where they decide.
    """
    if isinstance(spec.model, LoadedModel):
        return EngineChoice(spec.model.engine, "the model is loaded already")
    if spec.engine != "auto":
        return EngineChoice(spec.engine, f"engine={spec.engine!r} is set")
    if not is_gguf_file(spec.model):
        return EngineChoice("transformers", "the model is not named as a .gguf file")
    kwargs = spec.model_kwargs
    if kwargs and kwargs.keys() <= LlamaCppOptions.model_fields.keys():
        return EngineChoice("llama.cpp", f"{next(iter(kwargs))} in model_kwargs is a setting of llama.cpp")
    reason = _asks_for_transformers(spec, limits) or _lacks(spec, machine())
    if reason is not None:
        return EngineChoice("transformers", reason)
    return EngineChoice("llama.cpp", "it runs the .gguf file in its own quantisation")


def is_gguf_file(model: object) -> bool:
    """Return whether a model is named by the path of a `.gguf` file that exists."""
    if not isinstance(model, str | os.PathLike):
        return False
    path = Path(model).expanduser()
    return path.suffix == ".gguf" and path.is_file()


def _asks_for_transformers(spec: ModelSpec, limits: EngineLimits | None) -> str | None:
    """Return the setting that llama.cpp does not support, as a clause; None without one."""
    given = {
        "dtype": None if str(spec.dtype) == "auto" else str(spec.dtype),
        "quantization": spec.quantization,
        "revision": spec.revision,
        "device": None if str(spec.device) in _DEVICES else str(spec.device),
        "max_live": limits.max_live if limits is not None and limits.max_live > MAX_LIVE else None,
    }
    others = (name for name in spec.model_kwargs if name not in LlamaCppOptions.model_fields)
    settings = [f"{name}={value!r}" for name, value in given.items() if value is not None]
    settings += [f"{name} in model_kwargs" for name in others]
    return f"llama.cpp does not support {settings[0]}" if settings else None


def _lacks(spec: ModelSpec, machine: Machine) -> str | None:
    """Return why llama.cpp does not run here, or would leave a GPU unused, as a clause; None where it is fit."""
    if machine.no_llama_cpp is not None:
        return machine.no_llama_cpp
    device = str(spec.device)
    wanted = machine.gpu if device == "auto" else device
    if wanted in (None, "cpu") or machine.has_gpu_offload:
        return None
    return f"the llama.cpp that is installed has no GPU support, and there is {wanted}"


@cache
def log_choice(model: str, choice: EngineChoice) -> None:
    """Log the engine of a model, once in a process."""
    _log.info("%s runs on %s: %s", model, choice.name, choice.reason)
