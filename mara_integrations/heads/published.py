"""The paper's published actors: a bare state dict in a `.pth` file, read without running any code it may hold."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from mara_integrations.errors import HeadError
from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.folder import MAX_WEIGHT_BYTES, first_line, first_problem, read_regular


def read_published(path: Path) -> tuple[HeadConfig, dict[str, Tensor]]:
    """Read a published actor; shapes and numbers are for the caller to check.

    Raises:
        HeadError: If the file is missing, damaged, too large, or holds something else.
    """
    name = str(path)
    try:
        data = read_regular(path, MAX_WEIGHT_BYTES)
    except HeadError:
        raise
    except (OSError, ValueError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else first_line(error)
        raise HeadError(f"no head at {name!r}: {reason}", hint="name a .pth file or a head's folder") from None
    state = _load(name, data)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise HeadError(f"{name!r} holds {type(state).__name__}, not a state dict of tensors")
    tensors = {str(key).removeprefix("module."): value.detach() for key, value in state.items()}
    _check_plain(name, tensors, len(data))
    try:
        (wide, hidden_size), (narrow, _) = tensors["linear1.weight"].shape, tensors["linear2.weight"].shape
    except (KeyError, ValueError):
        raise HeadError(
            f"{name!r} has the keys {sorted(tensors)[:6]}, not ln.*, linear1.*, linear2.*, output_linear.*",
            hint="only actors of the published layout load; critics do not",
        ) from None
    try:
        config = HeadConfig(form="paper", hidden_size=hidden_size, inner_sizes=(wide, narrow), method="published")
    except ValidationError as error:
        raise HeadError(f"{name!r} holds no head: {first_problem(error)}") from None
    return config, tensors


def _load(name: str, data: bytes) -> Any:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > 2 * len(data):  # torch stores without compression
            raise HeadError(f"{name!r} is a compressed archive of {unpacked:,} bytes, not a file of torch.save")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except HeadError:
        raise
    except Exception as error:  # torch raises pickle, zip, runtime and attribute errors alike for a damaged file
        raise HeadError(
            f"{name!r} is not a checkpoint that loads safely: {first_line(error)}",
            hint="torch.save of a state dict writes one",
        ) from None


def _check_plain(name: str, tensors: Mapping[str, Tensor], file_bytes: int) -> None:
    """Refuse tensors that claim more numbers than the file holds.

    Raises:
        HeadError: Names the first such tensor.
    """
    storages = {}
    for key, tensor in tensors.items():
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not is_plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise HeadError(f"{name!r} has in {key!r} no plain tensor with numbers of its own")
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    if sum(storages.values()) > file_bytes:
        raise HeadError(f"{name!r} describes more numbers than it holds")
