"""Measure the memory of a device, and what of it keys and values may take."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# What is assumed where a system does not say what is free.
_UNKNOWN_BYTES = 4 << 30
# Shares of the free memory that keys and values take at most: a device is the model's, main memory is everybody's.
_SHARE_OF_DEVICE, _SHARE_OF_RAM = 0.75, 0.5


def default_kv_bytes(device: torch.device, spoken_for: int = 0) -> int:
    """Return the memory that keys and values may take where no limit is set, in bytes.

    Args:
        device: Where they are.
        spoken_for: Memory that counts as free and is going to be used otherwise, in bytes.
    """
    free = max(0, free_bytes(device) - spoken_for)
    return int(free * (_SHARE_OF_RAM if device.type == "cpu" else _SHARE_OF_DEVICE))


def free_bytes(device: torch.device) -> int:
    """Return the memory that this process can still take on a device, in bytes; a guess where the system is silent."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # ours, and unused
        return free + held
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    ram = free_ram_bytes()
    return _UNKNOWN_BYTES if ram is None else ram


def free_ram_bytes() -> int | None:
    """Return the main memory that this process can still take, in bytes; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):  # not Linux
        return _half_of_ram()
    try:
        group = Path("/sys/fs/cgroup")  # of a container
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no limit
        return free
    return min(free, max(0, limit - used))


def total_ram_bytes() -> int | None:
    """Return the main memory of this machine, or of its container, in bytes; None where the system does not say."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows
        return None
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no limit
        return total


def _half_of_ram() -> int | None:
    total = total_ram_bytes()
    return None if total is None else total // 2


def in_mib(num_bytes: int) -> str:
    """Return a number of bytes in MiB, as text; less than one in full."""
    return f"{num_bytes / (1 << 20):,.0f} MiB" if num_bytes >= 1 << 20 else f"{num_bytes} bytes"
