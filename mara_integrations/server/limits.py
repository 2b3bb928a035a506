"""Limits of what the server accepts: sequences at once, bytes of a body, seconds to wait for a client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from pydantic import Field
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Send

from mara_integrations.sampling import Params
from mara_integrations.server.errors import ClientClosedError, RefusalError

# Seconds in which a client has to take the next part of an answer.
SEND_TIMEOUT_S = 60.0

# Prompts are tokenised and grammars compiled here: slow ones do not hold up the event loop's own few threads.
_threads = ThreadPoolExecutor(32, thread_name_prefix="mara-server")
_Result = TypeVar("_Result")


class ServerLimits(Params):
    """Limits of what the server accepts.

    Attributes:
        max_running: Most sequences answered or waiting at once; each prompt of a request is one. The default is four
            full batches of 64: a client that would have to wait longer should ask another server.
        max_body_bytes: Largest body of a request. The default is a million words, more than most context windows hold.
        body_timeout_s: Seconds in which a body has to arrive; by default 4 MiB need 1.1 Mbit/s.
    """

    max_running: int = Field(256, ge=1)
    max_body_bytes: int = Field(4 << 20, ge=1)
    body_timeout_s: float = Field(30.0, gt=0, allow_inf_nan=False)


class Admission:
    """Counts the sequences that are answered, and refuses more than a maximum.

    Every prompt of a request is a sequence. Belongs to one event loop.

    Args:
        max_running: Sequences running or waiting in the engine at once.
    """

    def __init__(self, max_running: int) -> None:
        self.max_running = max_running
        self.num_running = 0

    def require_room(self) -> None:
        """Refuse a request whose size is not known yet, if there is no room at all.

        Raises:
            RefusalError: Status 503.
        """
        if self.num_running >= self.max_running:
            raise self._overloaded()

    def reserve(self, num_sequences: int) -> Reservation:
        """Let a request in; use the result with `with`. Nothing is awaited, so no other request comes between.

        Raises:
            RefusalError: Status 503 if there is no room now, 400 if there never will be.
        """
        if num_sequences > self.max_running:
            problem = f"the request has {num_sequences} prompts; this server takes {self.max_running} at once"
            raise RefusalError(400, f"{problem} (hint: send fewer in a request)", param="prompt")
        if self.num_running + num_sequences > self.max_running:
            raise self._overloaded()
        self.num_running += num_sequences
        return Reservation(self, num_sequences)

    def _overloaded(self) -> RefusalError:
        problem = f"{self.num_running} of at most {self.max_running} replies are running: try again later"
        return RefusalError(503, problem, code="overloaded")


class Reservation:
    """Room for the sequences of one request, given back when the `with` block ends."""

    def __init__(self, admission: Admission, num_sequences: int) -> None:
        self._admission, self._num_sequences = admission, num_sequences

    def __enter__(self) -> None:
        """The room is taken already."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._admission.num_running -= self._num_sequences


async def read_body(receive: Receive, headers: Headers, limits: ServerLimits) -> bytes:
    """Read a request's body, in bounded time and memory.

    Raises:
        RefusalError: Status 413 if the body is too large, 408 if it came too slowly.
        ClientClosedError: If the client left.
    """
    max_bytes, timeout_s = limits.max_body_bytes, limits.body_timeout_s
    too_large = RefusalError(413, f"the body has more than {max_bytes} bytes", code="body_too_large")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > max_bytes:
        raise too_large
    parts: list[bytes] = []

    async def read() -> None:
        num_bytes, is_more = 0, True
        while is_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientClosedError
            parts.append(message.get("body", b""))
            num_bytes += len(parts[-1])
            if num_bytes > max_bytes:
                raise too_large
            is_more = message.get("more_body", False)

    try:
        await asyncio.wait_for(read(), timeout_s)
    except asyncio.TimeoutError:
        problem = f"the body did not arrive within {timeout_s:g} s"
        raise RefusalError(408, problem, headers={"connection": "close"}) from None
    return b"".join(parts)


def timed(send: Send, timeout_s: float) -> Send:
    """Return `send` with a time limit: a client that does not read its answer is treated as gone."""

    async def send_in_time(message: Message) -> None:
        try:
            await asyncio.wait_for(_awaited(send(message)), timeout_s)
        except asyncio.TimeoutError:
            raise ClientClosedError from None

    return send_in_time


async def _awaited(awaitable: Awaitable[_Result]) -> _Result:
    return await awaitable


async def in_thread(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Call a function in a thread. When the caller is cancelled, the thread's end is awaited all the same.

    A thread can't be stopped; whoever reserved room for its work has to hold that room until the work ends.
    """
    work = asyncio.get_running_loop().run_in_executor(_threads, function, *arguments)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        if not work.cancelled():
            work.exception()  # read, so that it is not reported as lost
        raise


async def all_or_none(coroutines: Sequence[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """Run coroutines together; the first failure cancels the others and is raised.

    `asyncio.TaskGroup` does the same from Python 3.11 on.
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _cancelled(tasks)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Return what `work` returns, unless the client leaves first, which cancels it.

    Raises:
        ClientClosedError: If the client left.
    """

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    left = asyncio.ensure_future(disconnect())
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait([working, left], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientClosedError
        return working.result()
    finally:
        await _cancelled([working, left])


async def _cancelled(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel tasks and wait for their ends."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
