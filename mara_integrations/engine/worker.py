"""The one thread that owns a decoder. Any thread or event loop submits to it; all that waits is decoded together."""

from __future__ import annotations

import asyncio
import atexit
import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.generation import Generation
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.engine.request import Request
from mara_integrations.engine.sequence import Sequence
from mara_integrations.errors import EngineClosedError

# An idle thread ends after this long and a new one starts with the next request: an unused engine holds no thread.
_IDLE_S = 5.0
# At the end of the process, a thread gets this long to finish its step.
_EXIT_S = 10.0

_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class Update:
    """News of one reply.

    Attributes:
        text: What has become certain since the last update; may be empty.
        token_ids: Taken since the last update.
        generation: The whole reply, on the last update only.
    """

    text: str
    token_ids: tuple[int, ...]
    generation: Generation | None = None


_Ticket = TypeVar("_Ticket", bound="Ticket")
News: TypeAlias = "Update | BaseException"


class Ticket(ABC):
    """A submitted request, seen by the one who waits for it.

    Leaving the loop over it early, closing the iterator or cancelling the task stops the generation at its next token.
    """

    def __init__(self) -> None:
        self.is_cancelled = False

    def cancel(self) -> None:
        """Stop at the next token; no more updates come."""
        self.is_cancelled = True

    @abstractmethod
    def deliver(self, news: News) -> None:
        """Pass on an update, or what went wrong; called in the decoder's thread."""


class ThreadTicket(Ticket):
    """A ticket to wait for with `for`."""

    def __init__(self) -> None:
        super().__init__()
        self._inbox: queue.SimpleQueue[News] = queue.SimpleQueue()

    def deliver(self, news: News) -> None:
        """See `Ticket`."""
        self._inbox.put(news)

    def __iter__(self) -> Generator[Update, None, None]:
        """Wait for updates, blocking.

        Raises:
            Exception: What went wrong in the model, as raised there.
        """
        try:
            while True:
                update = _checked(self._inbox.get())
                yield update
                if update.generation is not None:
                    return
        finally:
            self.cancel()


class LoopTicket(Ticket):
    """A ticket to wait for with `async for`, in the event loop that runs when it is submitted."""

    def __init__(self) -> None:
        super().__init__()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: asyncio.Queue[News] = asyncio.Queue()

    def bind(self) -> None:
        """Deliver to the running event loop."""
        self._loop = asyncio.get_running_loop()

    def deliver(self, news: News) -> None:
        """See `Ticket`."""
        assert self._loop is not None, "bind it first"
        try:
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, news)
        except RuntimeError:  # the loop was closed: nobody waits any more
            self.cancel()

    async def __aiter__(self) -> AsyncGenerator[Update, None]:
        """Wait for updates without blocking the event loop; raises as `ThreadTicket.__iter__` does."""
        try:
            while True:
                update = _checked(await self._inbox.get())
                yield update
                if update.generation is not None:
                    return
        finally:
            self.cancel()


Item = TypeVar("Item")


class Stream(Generator[Item, None, None]):
    """A generator that stops a generation when it is closed or dropped, also before its first item.

    A plain one that was never started runs no `finally`.

    Args:
        items: What to iterate over.
        cancel: Stops the generation; may be called more than once, and in any thread.
    """

    def __init__(self, items: Generator[Item, None, None], cancel: Callable[[], None]) -> None:
        self._items = items
        self.cancel = cancel

    def __next__(self) -> Item:
        """Return the next item."""
        return next(self._items)

    def send(self, value: None) -> Item:
        """See `Generator`."""
        return self._items.send(value)

    def throw(self, *error: Any) -> Item:
        """See `Generator`."""
        return self._items.throw(*error)

    def close(self) -> None:
        """Stop the generation."""
        self.cancel()
        self._items.close()

    def __del__(self) -> None:
        self.cancel()


class AsyncStream(AsyncGenerator[Item, None]):
    """An async generator that stops a generation at once when it is dropped.

    Of a plain one, the event loop only makes a note and closes it at its next turn; and a framework that keeps the
    exception it is closed with keeps, by its frames, all generators inside it: those are then never closed.

    Args:
        items: What to iterate over.
        cancel: Stops the generation; may be called more than once, and in any thread.
    """

    def __init__(self, items: AsyncGenerator[Item, None], cancel: Callable[[], None]) -> None:
        self._items = items
        self.cancel = cancel

    async def __anext__(self) -> Item:
        """The next item; a coroutine of its own, so that this object lives while somebody waits."""
        return await self._items.__anext__()

    async def asend(self, value: None) -> Item:
        """See `AsyncGenerator`."""
        return await self._items.asend(value)

    async def athrow(self, *error: Any) -> Item:
        """See `AsyncGenerator`."""
        return await self._items.athrow(*error)

    async def aclose(self) -> None:
        """Stop the generation."""
        self.cancel()
        await self._items.aclose()

    def __del__(self) -> None:
        self.cancel()


def _checked(news: News) -> Update:
    if isinstance(news, BaseException):
        raise news
    return news


@dataclass(slots=True)
class _Delivery:
    """How much of a reply its ticket has heard."""

    ticket: Ticket
    sent_chars: int = 0
    sent_tokens: int = 0

    def update(self, sequence: Sequence) -> None:
        text = sequence.request.text.text if sequence.request.text else ""
        new_text, new_tokens = text[self.sent_chars :], sequence.token_ids[self.sent_tokens :]
        generation = sequence.result() if sequence.finish_reason is not None else None
        if new_tokens or generation is not None:
            self.ticket.deliver(Update(new_text, tuple(new_tokens), generation))
            self.sent_chars, self.sent_tokens = len(text), len(sequence.token_ids)


class Worker:
    """Runs a decoder in a thread of its own while there is work; requests are begun in the order they were submitted.

    Args:
        decoder: Used by no one else.
        max_waiting: Most requests that wait to be begun; `submit` blocks while there are as many. None is what the
            decoder's limits say.
    """

    def __init__(self, decoder: Decoder, max_waiting: int | None = None) -> None:
        self._decoder = decoder
        self._max_waiting = max_waiting or decoder.limits.max_waiting
        self._inbox: queue.SimpleQueue[tuple[Request, Ticket] | None] = queue.SimpleQueue()  # None wakes the thread
        self._deliveries: dict[int, _Delivery] = {}  # by id of the request
        self._lock = threading.Lock()
        self._has_moved = threading.Condition(self._lock)  # requests were begun or dropped
        self._is_running = self._is_closed = False
        self._thread: threading.Thread | None = None
        _workers.add(self)

    @property
    def limits(self) -> EngineLimits:
        """How much memory and work its decoder takes on."""
        return self._decoder.limits

    def submit(self, request: Request, ticket: _Ticket) -> _Ticket:
        """Queue a request, waiting for room unless its ticket is cancelled; its updates go to the ticket.

        Raises:
            EngineClosedError: If the worker was closed.
        """
        with self._lock:
            while self._num_waiting >= self._max_waiting and not (self._is_closed or ticket.is_cancelled):
                self._has_moved.wait()
            if self._is_closed:
                raise EngineClosedError("the engine is closed", hint="make a new one")
            self._inbox.put((request, ticket))
            if not self._is_running:
                self._is_running = True
                self._thread = threading.Thread(target=self._run, name="mara-decoder", daemon=True)
                self._thread.start()
        return ticket

    @property
    def _num_waiting(self) -> int:
        return self._inbox.qsize() + len(self._decoder.scheduler.waiting)

    def close(self) -> None:
        """Take no more requests, and end what runs at its next token; whoever waits for it gets `EngineClosedError`."""
        with self._lock:
            self._is_closed = True
            self._has_moved.notify_all()
        for delivery in list(self._deliveries.values()):
            delivery.ticket.cancel()
            delivery.ticket.deliver(EngineClosedError("the engine was closed before the reply was finished"))
        self._inbox.put(None)

    def join(self, timeout: float | None = _EXIT_S) -> None:
        """Wait until the thread has ended; after `close`, that is at its next token."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _run(self) -> None:
        while self._receive():
            self._drop_cancelled()
            if self._decoder.is_idle:
                continue
            try:
                done = self._decoder.step()
            except Exception as error:  # the model failed: everybody waiting hears it, and the decoder starts clean
                self._decoder.abort()
                failed, self._deliveries = self._deliveries, {}
                for delivery in failed.values():
                    delivery.ticket.deliver(error)
                continue
            for sequence in (*self._decoder.scheduler.live, *done):
                delivery = self._deliveries[id(sequence.request)]
                if not delivery.ticket.is_cancelled:
                    delivery.update(sequence)
            for sequence in done:
                del self._deliveries[id(sequence.request)]

    def _receive(self) -> bool:
        """Take in new requests, waiting for one when there is nothing to do; False: the thread may end."""
        try:
            wait_s = _IDLE_S if self._decoder.is_idle and not self._is_closed else 0.0
            item = self._inbox.get(timeout=wait_s)
            while item is not None:
                request, ticket = item
                self._deliveries[id(request)] = _Delivery(ticket)
                self._decoder.submit(request)
                item = self._inbox.get_nowait()
        except queue.Empty:
            pass
        with self._lock:  # nobody can submit between this look and the end of the thread
            self._has_moved.notify_all()
            self._is_running = not self._decoder.is_idle or not self._inbox.empty()
            return self._is_running

    def _drop_cancelled(self) -> None:
        scheduler = self._decoder.scheduler
        for sequence in scheduler.live:
            sequence.is_cancelled |= self._deliveries[id(sequence.request)].ticket.is_cancelled
        for request in [r for r in scheduler.waiting if self._deliveries[id(r)].ticket.is_cancelled]:
            scheduler.waiting.remove(request)
            del self._deliveries[id(request)]


@atexit.register
def _end_threads() -> None:
    """A thread that is inside torch when the interpreter goes would abort the process."""
    workers = list(_workers)
    for worker in workers:
        worker.close()
    for worker in workers:
        worker.join()
