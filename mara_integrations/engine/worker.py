"""The one thread that owns a decoder. Any thread or event loop submits to it; all that waits is decoded together."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.sequence import Generation, Request, Sequence
from mara_integrations.errors import EngineClosedError

# An idle thread ends after this long and a new one starts with the next request: an unused engine holds no thread.
_IDLE_S = 5.0


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


class Ticket:
    """A submitted request, seen by the one who waits for it: iterate over its updates, from a thread or a coroutine.

    Leaving the loop early, closing the iterator or cancelling the task stops the generation at its next token.
    """

    def __init__(self) -> None:
        self.is_cancelled = False
        self._deliver: Callable[[Update | BaseException], None]

    def cancel(self) -> None:
        """Stop at the next token; no more updates come."""
        self.is_cancelled = True

    def __iter__(self) -> Iterator[Update]:
        """Wait for updates, blocking.

        Raises:
            Exception: What went wrong in the model, as raised there.
        """
        inbox = self._inbox
        try:
            while True:
                item = inbox.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.generation is not None:
                    return
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Update]:
        """Wait for updates without blocking the event loop; raises as `__iter__` does."""
        try:
            while True:
                item = await self._async_inbox.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.generation is not None:
                    return
        finally:
            self.cancel()

    @classmethod
    def for_thread(cls) -> Ticket:
        """A ticket to wait for with `for`."""
        ticket = cls()
        ticket._inbox = queue.SimpleQueue[Update | BaseException]()
        ticket._deliver = ticket._inbox.put
        return ticket

    @classmethod
    def for_loop(cls) -> Ticket:
        """A ticket to wait for with `async for`, in the running event loop."""
        ticket, loop = cls(), asyncio.get_running_loop()
        ticket._async_inbox = asyncio.Queue[Update | BaseException]()

        def deliver(item: Update | BaseException) -> None:
            try:
                loop.call_soon_threadsafe(ticket._async_inbox.put_nowait, item)
            except RuntimeError:  # the loop was closed: nobody waits any more
                ticket.cancel()

        ticket._deliver = deliver
        return ticket


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
            self.ticket._deliver(Update(new_text, tuple(new_tokens), generation))
            self.sent_chars, self.sent_tokens = len(text), len(sequence.token_ids)


class Worker:
    """Runs a decoder in a thread of its own while there is work."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._inbox: queue.SimpleQueue[tuple[Request, Ticket]] = queue.SimpleQueue()
        self._deliveries: dict[int, _Delivery] = {}  # by id of the request
        self._lock = threading.Lock()
        self._is_running = self._is_closed = False

    def submit(self, request: Request, ticket: Ticket) -> Ticket:
        """Queue a request; its updates go to the ticket.

        Raises:
            EngineClosedError: If the worker was closed.
        """
        with self._lock:
            if self._is_closed:
                raise EngineClosedError("the engine is closed", hint="make a new one")
            self._inbox.put((request, ticket))
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="mara-decoder", daemon=True).start()
        return ticket

    def close(self) -> None:
        """Take no more requests, and end what runs at its next token."""
        with self._lock:
            self._is_closed = True
        for delivery in list(self._deliveries.values()):
            delivery.ticket.cancel()

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
                    delivery.ticket._deliver(error)
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
            item = self._inbox.get(timeout=_IDLE_S) if self._decoder.is_idle else self._inbox.get_nowait()
            while True:
                request, ticket = item
                self._deliveries[id(request)] = _Delivery(ticket)
                self._decoder.submit(request)
                item = self._inbox.get_nowait()
        except queue.Empty:
            pass
        with self._lock:  # nobody can submit between this look and the end of the thread
            self._is_running = not self._decoder.is_idle or not self._inbox.empty()
            return self._is_running

    def _drop_cancelled(self) -> None:
        scheduler = self._decoder.scheduler
        for sequence in scheduler.live:
            sequence.cancelled |= self._deliveries[id(sequence.request)].ticket.is_cancelled
        for request in [r for r in scheduler.waiting if self._deliveries[id(r)].ticket.is_cancelled]:
            scheduler.waiting.remove(request)
            del self._deliveries[id(request)]
