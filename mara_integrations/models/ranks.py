"""Experimental: several processes, started by torchrun, hold one model. Rank 0 runs the program, the others follow.

Rank 0 does all that a single process would: it reads, decides, trains, answers and writes. Work that has to happen in
all of them, because each holds a part of the model, it starts by `everywhere`. So the processes never have to reach the
same decision by themselves, for example from measured times, and everything that one process can do works, also a
server. A message is a function of a module and its arguments; pickled, it comes from our own process only.
"""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, NoReturn, TypeVar

from mara_integrations.errors import EngineClosedError, MaraError

# Others may come as late as their disk reads a model; between two requests to a server any time may pass.
_START, _FOREVER = timedelta(hours=2), timedelta(days=365)

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Shared(Generic[Value]):
    """An object that was made in every process; given to `everywhere`, each process uses its own.

    Attributes:
        number: Number of the object, the same in all processes.
        value: The object of this process.
    """

    number: int
    value: Value

    def __reduce__(self) -> tuple[Any, ...]:
        return _own, (self.number,)


@dataclass(frozen=True, slots=True)
class _Message:
    """A call that the other processes have to make.

    Attributes:
        function: Function to call; None ends the process.
        arguments: Arguments of the function.
        kept_as: Number under which the result is kept; None drops it.
        released: Numbers of kept results that rank 0 no longer uses.
    """

    function: Callable[..., Any] | None = None
    arguments: tuple[Any, ...] = ()
    kept_as: int | None = None
    released: tuple[int, ...] = ()


_control: Any = None  # the group of processes that messages go to; None until `join`
_lock = threading.RLock()
_numbers = itertools.count()
_released: deque[int] = deque()
_kept: dict[int, Any] = {}  # in a process that follows


def has_others() -> bool:
    """Return whether torchrun started more processes than this one."""
    return {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys() and int(os.environ.get("WORLD_SIZE", 1)) > 1


def accelerator() -> str | None:
    """Return the type of device that each process takes one of, as `cuda`; None where they compute on the CPU."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if device is None or device.type == "mps" else device.type  # Apple's GPUs form no process group


def join() -> None:
    """Wait for the other processes. Rank 0 returns; the others follow it to its end and do not return."""
    global _control
    with _lock:
        if _control is not None:
            return
        import torch
        import torch.distributed as dist

        kind = accelerator()
        if kind is None:
            dist.init_process_group("gloo", timeout=_START)
        else:
            device = torch.device(kind, int(os.environ["LOCAL_RANK"]))
            torch.accelerator.set_device_index(device.index)
            backend = dist.get_default_backend_for_device(device)
            dist.init_process_group(backend, timeout=_START, device_id=device if backend == "nccl" else None)
        _control = dist.new_group(backend="gloo", timeout=_FOREVER)
        if dist.get_rank() > 0:
            _follow()


def everywhere(function: Callable[..., Value], *arguments: Any) -> Value:
    """Call a function of a module in every process; returns what it does here.

    Raises:
        EngineClosedError: If the others have ended, or are in the middle of something that failed here.
    """
    with _in_step():
        _send(_Message(function, arguments, released=_take_released()))
        return function(*map(_unwrapped, arguments))


def shared(function: Callable[..., Value], *arguments: Any) -> Shared[Value]:
    """Call a function in every process and keep each result until the returned object is garbage-collected."""
    with _in_step():
        number = next(_numbers)
        _send(_Message(function, arguments, number, _take_released()))
        made = Shared(number, function(*map(_unwrapped, arguments)))
    weakref.finalize(made, _released.append, number).atexit = False
    return made


def own_part(tensor: Any) -> Any:
    """Return this process' part of a tensor that is spread over processes; another tensor is returned as it is."""
    return tensor.to_local() if is_spread(tensor) else tensor


def is_spread(tensor: Any) -> bool:
    """Return whether other processes hold parts of a tensor."""
    return hasattr(tensor, "to_local")  # a DTensor; to import its class takes long


@contextmanager
def _in_step() -> Iterator[None]:
    """Send one message and do its work. Any error but a `MaraError` leaves the processes out of step for good."""
    global _control
    with _lock:
        try:
            yield
        except MaraError:
            raise
        except BaseException:
            _control = None
            raise


def _own(number: int) -> Any:
    value = _kept[number]
    if isinstance(value, MaraError):
        raise RuntimeError("the first process goes on with what failed in this one") from value
    return value


def _unwrapped(argument: Any) -> Any:
    return argument.value if isinstance(argument, Shared) else argument


def _take_released() -> tuple[int, ...]:
    return tuple(_released.popleft() for _ in range(len(_released)))


def _send(message: _Message) -> None:
    import torch.distributed as dist

    if _control is None:
        raise EngineClosedError("the processes that hold the model together have ended", hint="start all again")
    dist.broadcast_object_list([message], src=0, group=_control)


def _follow() -> NoReturn:
    """Do what the first process says; ends this one, in whatever thread it is."""
    import torch.distributed as dist

    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process handles Ctrl-C
    status = 0
    try:
        while True:
            inbox: list[Any] = [None]
            dist.broadcast_object_list(inbox, src=0, group=_control)
            message: _Message = inbox[0]
            for number in message.released:
                del _kept[number]
            if message.function is None:
                break
            try:
                result = message.function(*message.arguments)
            except MaraError as error:  # the first process meets the same error, and reports it
                result = error
            if message.kept_as is not None:
                _kept[message.kept_as] = result
    except BaseException:  # the first process waits for this one in vain: torchrun ends it, and shows this
        status = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@atexit.register  # before the engine's threads are known, so after they have ended
def _dismiss() -> None:
    """End the other processes, and the group's threads: one that drops a tensor as Python ends aborts the process."""
    global _control
    with _lock:
        if _control is not None:
            import torch.distributed as dist

            _send(_Message())
            dist.destroy_process_group(_control)
            _control = None
