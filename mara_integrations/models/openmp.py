"""Threads of OpenMP, among which PyTorch and llama.cpp share an operation on the CPU."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

# Seconds of work after which it is decided how threads wait, and for which they then sleep.
_WINDOW_S, _ASLEEP_S = 0.2, 4.0
# Share of its time for which a thread has a processor where its threads wait awake and no other program takes one.
_FREE = 0.9


def release_threads() -> None:
    """End the threads that GNU's OpenMP keeps for the thread that calls; for its next operation it gets new ones.

    Each thread that computes has such threads of its own. As soon as a process has more of them than processors, they
    all sleep between any two operations, and to wake them takes as long as many an operation of a small model: a
    decoder that ran beside an idle set measured up to 1.8 times as slow, and was faster on one processor than on two.
    """
    library = _gnu_openmp()
    if library is not None:
        library.omp_pause_resource_all(1)  # omp_pause_soft: this thread's alone; inside a parallel region nothing


class WaitingThreads:
    """Decides how the threads that compute for one thread wait for each other, where they are those of GNU's OpenMP.

    Awake is faster, as long as each has a processor. Where other programs take one, a thread that waits awake keeps it
    from the one that it waits for, and asleep is two to three times as fast. They sleep while a process has more of
    them than processors. To have them sleep, another thread is started, which has some, too.

    Args:
        on_cpu: True if the model runs on the CPU and in this process. Otherwise nothing changes how threads wait.
    """

    def __init__(self, on_cpu: bool = True) -> None:
        self._on_cpu = on_cpu and _gnu_openmp() is not None
        self._idle: threading.Thread | None = None
        self._ended = threading.Event()
        self._wall_s = self._cpu_s = 0.0

    @property
    def is_asleep(self) -> bool:
        """True if idle OpenMP threads sleep instead of spinning."""
        return self._idle is not None

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Observe what the thread that calls does."""
        start, cpu_start = time.perf_counter(), time.thread_time()
        yield
        self.observe(time.perf_counter() - start, time.thread_time() - cpu_start)

    def observe(self, wall_s: float, cpu_s: float) -> None:
        """Take note of work that took this long, and for how long of it the thread had a processor."""
        self._wall_s, self._cpu_s = self._wall_s + wall_s, self._cpu_s + cpu_s
        if self._wall_s < (_ASLEEP_S if self.is_asleep else _WINDOW_S):
            return
        is_free = self._cpu_s >= _FREE * self._wall_s
        self._wall_s = self._cpu_s = 0.0
        if self.is_asleep:
            self.close()  # to see whether there is more room now
        elif self._on_cpu and not is_free and torch.get_num_threads() > 1:
            self._ended.clear()
            self._idle = threading.Thread(target=self._keep_threads, name="mara-idle", daemon=True)
            self._idle.start()

    def close(self) -> None:
        """Let them wait awake, as at the start."""
        if self._idle is not None:
            self._ended.set()
            self._idle.join()
            self._idle = None

    def _keep_threads(self) -> None:
        torch.ones(1 << 20).exp()
        self._ended.wait()


@cache
def _gnu_openmp() -> Any:
    """Return the library that torch has loaded; None where it uses another one, which has no such rule."""
    for file in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD)
            library.omp_pause_resource_all.argtypes = [ctypes.c_int]
            return library
    return None
