"""Threads of OpenMP, among which PyTorch and llama.cpp share an operation on the CPU."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

# Rounds that a waiting thread looks for work before it sleeps. GNU's OpenMP has 300,000, some milliseconds, which other
# programs on the machine could use; with 2,000 measured decoding is as fast.
_ROUNDS = "2000"


def wait_briefly() -> None:
    """Let threads of GNU's OpenMP sleep soon when they wait, unless the environment says how they wait.

    For a program that has not imported torch yet: OpenMP reads its settings once, with that.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _ROUNDS)


def release_threads() -> None:
    """End the threads that GNU's OpenMP keeps for the thread that calls; for its next operation it gets new ones.

    Each thread that computes has such threads of its own. As soon as a process has more of them than processors, they
    all sleep between any two operations, and to wake them takes as long as many an operation of a small model: a
    decoder that ran beside an idle set measured up to 1.8 times as slow, and was faster on one processor than on two.
    """
    library = _gnu_openmp()
    if library is not None:
        library.omp_pause_resource_all(1)  # omp_pause_soft: this thread's alone; inside a parallel region nothing


@cache
def _gnu_openmp() -> Any:
    """Return the library that torch has loaded; None where it uses another one, which has no such rule."""
    import torch

    for file in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD)
            library.omp_pause_resource_all.argtypes = [ctypes.c_int]
            return library
    return None
