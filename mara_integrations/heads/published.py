"""The paper's published actors: a bare state dict in a `.pth` file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mara_integrations.errors import HeadError
from mara_integrations.heads.config import HeadConfig


def read_published(path: Path) -> tuple[HeadConfig, dict[str, Tensor]]:
    """Read a published actor without running any code that it may hold.

    Raises:
        HeadError: If the file is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise HeadError(f"no head at {str(path)!r}: there is no such file", hint="name a .pth file or a head's folder")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip, runtime and attribute errors alike for a damaged file
        reason = str(error).strip().split("\n")[0]
        raise HeadError(f"{str(path)!r} is not a checkpoint that loads safely: {reason}") from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise HeadError(f"{str(path)!r} holds {type(state).__name__}, not a state dict of tensors")
    tensors = {str(name).removeprefix("module."): value.float() for name, value in state.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        (wide, hidden_size), (narrow, _) = shapes["linear1.weight"], shapes["linear2.weight"]
    except (KeyError, ValueError):
        raise HeadError(
            f"{str(path)!r} has the keys {sorted(shapes)[:6]}, not ln.*, linear1.*, linear2.*, output_linear.*",
            hint="only actors of the published layout load; critics do not",
        ) from None
    config = HeadConfig(form="paper", hidden_size=hidden_size, inner_sizes=(wide, narrow), method="published")
    return config, tensors
