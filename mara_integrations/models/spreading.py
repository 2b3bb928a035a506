"""Settings of `from_pretrained` that spread a model over processes, and what must hold before one is spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mara_integrations.errors import ConfigError
from mara_integrations.models import experimental, ranks
from mara_integrations.models.devices import choose_device

_SPREADING = ("tp_plan", "tp_size", "distributed_config")


def spreads_model(model_kwargs: Mapping[str, Any]) -> bool:
    """Return whether these settings spread a model over processes."""
    return any(model_kwargs.get(name) is not None for name in _SPREADING)


def join_processes(model_kwargs: Mapping[str, Any], device: str | torch.device) -> None:
    """Wait for the processes that will hold the model together. Only the first process returns.

    Args:
        model_kwargs: Settings that spread a model.
        device: Device as the user named it.

    Raises:
        ConfigError: If this process is the only one, if the processes would use GPUs and that feature is not turned
            on, or if the device is not one of each process's own.
    """
    named = next(name for name in _SPREADING if model_kwargs.get(name) is not None)
    if not ranks.has_others():
        raise ConfigError(
            f"{named}={model_kwargs[named]!r} spreads a model over several processes, and only one is running",
            hint="`torchrun --nproc-per-node 2 -m mara_integrations ...` starts two; in one process, device_map=auto "
            "spreads the model over its devices",
        )
    accelerator = ranks.accelerator()
    if accelerator is not None and not experimental.is_enabled("gpu-tensor-parallel"):
        raise ConfigError(
            f"{named}={model_kwargs[named]!r} spreads a model over {accelerator} devices; this is experimental and "
            "has not been tested on a GPU yet",
            hint=f"{experimental.VARIABLE}=gpu-tensor-parallel turns it on; device_map=auto needs only one process",
        )
    ranks.join()
    if device != "auto" and torch.device(device).type != choose_device("auto").type:
        raise ConfigError(
            f"device={str(device)!r} is not allowed: each process uses a {choose_device('auto').type} of its own",
            hint="device='auto'",
        )
