"""Choose the device and the number format of a model: what `auto` stands for, and what this machine has."""

from __future__ import annotations

import torch

from mara_integrations.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str | torch.device) -> torch.device:
    """Return the device that is named; `auto` is CUDA, then MPS, then CPU.

    Raises:
        ConfigError: If it is unknown, or this machine has none.
    """
    if device == "auto":
        mps_or_cpu = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else mps_or_cpu
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device={device!r} is unknown", hint="allowed: auto, cpu, cuda, cuda:N, mps") from None
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            raise ConfigError(
                f"device={str(device)!r} is not available: {count} CUDA devices", hint="device='auto' finds one"
            )
        chosen = torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)
    if chosen.type == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError(f"device={str(device)!r} is not available here", hint="device='auto' finds one")
        chosen = torch.device("mps", 0)  # as its tensors name it
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the number format that is named; `auto` is the best one that the device has.

    Raises:
        ConfigError: If it is not one of ours.
    """
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    if dtype != "auto":
        raise ConfigError(f"dtype={dtype!r} is not allowed", hint=f"allowed: auto, {', '.join(_DTYPES)}")
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device)[0] >= 8 or torch.version.hip is not None
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if device.type == "mps":
        try:
            torch.zeros(1, dtype=torch.bfloat16, device=device)
        except (RuntimeError, TypeError):  # before macOS 14
            return torch.float16
        return torch.bfloat16
    return torch.float32


def has_fast_bfloat16() -> bool:
    """Return whether the processor has instructions that multiply bfloat16; false where torch can't tell."""
    tell = getattr(torch.cpu, "get_capabilities", None)
    found = tell() if tell is not None else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
