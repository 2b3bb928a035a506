"""The one thread that owns a decoder. Any thread or event loop can submit; all requests are decoded together."""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import weakref
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from mara_integrations.engine.faults import described
from mara_integrations.engine.generation import FinishReason
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.engine.request import Request
from mara_integrations.engine.scheduler import Scheduler
from mara_integrations.engine.sequence import Sequence
from mara_integrations.engine.tickets import Mailbox, News, Ticket, Update
from mara_integrations.errors import EngineClosedError, MaraError, in_one_line
from mara_integrations.models.openmp import WaitingThreads
from mara_integrations.replies.calls import Call, Piece
from mara_integrations.replies.reader import ReplyReader

# An idle thread ends after this long and a new one starts with the next request: an unused engine holds no thread.
_IDLE_S = 5.0
# At the end of the process, a thread gets this long to finish its step.
_EXIT_S = 60.0
_log = logging.getLogger(__name__)

_workers: weakref.WeakSet[Worker] = weakref.WeakSet()
_Ticket = TypeVar("_Ticket", bound=Ticket)


class AnyDecoder(Protocol):
    """The operations that the worker needs; `decoder.Decoder` describes them, and decodes on our backends."""

    limits: EngineLimits
    scheduler: Scheduler

    @property
    def is_idle(self) -> bool:
        """Nothing is live or waiting."""

    @property
    def is_failing(self) -> bool:
        """The engine is at fault, not a request."""

    def check(self, request: Request) -> None:
        """Refuse a request that can never be decoded; may be called in any thread."""

    def submit(self, request: Request) -> None:
        """Queue a request."""

    def step(self) -> list[Sequence]:
        """Decode some more; returns the sequences that have finished."""

    def abort(self) -> None:
        """Drop everything that is live or waiting."""


@dataclass(slots=True)
class _Delivery:
    """The part of a reply that its mailbox has received.

    Attributes:
        mailbox: Where the updates go.
        num_chars: Length of the raw text that was delivered.
        num_tokens: Number of tokens that were delivered.
        pieces: The same text, read.
    """

    mailbox: Mailbox
    num_chars: int = 0
    num_tokens: int = 0
    pieces: list[Piece] = field(default_factory=list)

    def update(self, sequence: Sequence) -> None:
        """Deliver what has come since the last update, or the error that ended the request."""
        if sequence.error is not None:
            self.mailbox.deliver(sequence.error)
            return
        text = sequence.request.text.text if sequence.request.text else ""
        new_text, new_tokens = text[self.num_chars :], tuple(sequence.token_ids[self.num_tokens :])
        if not new_tokens and sequence.finish_reason is None:
            return
        pieces, calls = _read(sequence.request.reader, new_text, sequence.finish_reason)
        self.pieces += pieces
        self.num_chars, self.num_tokens = len(text), len(sequence.token_ids)
        generation = None
        if sequence.finish_reason is not None:
            answer, thoughts = ("".join(getattr(piece, kind) for piece in self.pieces) for kind in ("text", "thoughts"))
            generation = replace(sequence.result(), text=answer, thoughts=thoughts, calls=calls)
        self.mailbox.deliver(Update(new_text, new_tokens, pieces, calls, generation))


def _read(
    reader: ReplyReader | None, text: str, finish_reason: FinishReason | None
) -> tuple[tuple[Piece, ...], tuple[Call, ...]]:
    """Read more of a reply; return what is new, and copies of all calls so far, which the reader goes on changing."""
    if reader is None:
        return (Piece(text),) if text else (), ()
    pieces = tuple(reader.push(text, finish_reason))
    return pieces, tuple(replace(call) for call in reader.calls)


class Worker:
    """Runs a decoder in a thread of its own while there is work; requests begin in the order they were submitted.

    Every caller gets an answer: the reply, or an error. A failure of one request is raised for its caller. A failure of
    the decoder is raised for all callers at that time; if the decoder can't be cleaned up, the worker has failed for
    good, and later callers get that error too.

    Args:
        decoder: The decoder; nothing else may use it.
        max_waiting: Most requests that wait to be begun; `submit` blocks while there are as many. None is the limit
            of the decoder.
        on_cpu: True if the model runs on the CPU and in this process.

    Attributes:
        decoder: The decoder; only the worker's thread may call it.
        failure: What ended the worker for good; None while it works.
    """

    def __init__(self, decoder: AnyDecoder, max_waiting: int | None = None, on_cpu: bool = False) -> None:
        self.decoder = decoder
        self.failure: BaseException | None = None
        self._max_waiting = max_waiting or decoder.limits.max_waiting
        self._inbox: queue.SimpleQueue[tuple[Request, Mailbox] | None] = queue.SimpleQueue()  # None wakes the thread
        self._deliveries: dict[int, _Delivery] = {}  # by id of the request; the thread's own
        self._lock = threading.Lock()
        self._has_moved = threading.Condition(self._lock)  # requests were begun or dropped
        self._is_running = self._is_closed = False
        self._thread: threading.Thread | None = None
        self._threads = WaitingThreads(on_cpu)
        _workers.add(self)

    @property
    def limits(self) -> EngineLimits:
        """Limits on the memory and work of the decoder."""
        return self.decoder.limits

    @property
    def is_healthy(self) -> bool:
        """Whether requests can expect an answer: the worker is open, has not failed, and its forwards succeed."""
        return not self._is_closed and self.failure is None and not self.decoder.is_failing

    @property
    def num_live(self) -> int:
        """Requests that are being decoded."""
        return len(self.decoder.scheduler.live)

    @property
    def num_waiting(self) -> int:
        """Requests that wait to be decoded."""
        return self._inbox.qsize() + len(self.decoder.scheduler.waiting)

    @property
    def is_running(self) -> bool:
        """Whether the decoder's thread is at work."""
        return self._is_running

    def submit(self, request: Request, ticket: _Ticket) -> _Ticket:
        """Queue a request, waiting for room unless its ticket is cancelled; its updates go to the ticket.

        Raises:
            ConfigError: If the request can never be decoded, see `Decoder.check`.
            EngineClosedError: If the worker is closed or has failed.
        """
        self.decoder.check(request)
        with self._lock:
            while self.num_waiting >= self._max_waiting and self._is_open and not ticket.is_cancelled:
                self._has_moved.wait()
            if not self._is_open:
                raise self._closed_error()
            self._inbox.put((replace(request), ticket.mailbox))  # a copy: the same request may be submitted twice
            if not self._is_running:
                self._is_running = True
                self._thread = threading.Thread(target=self._run, name="mara-decoder", daemon=True)
                self._thread.start()
        return ticket

    def close(self) -> None:
        """Take no more requests and decode no more tokens; whoever waits gets `EngineClosedError`."""
        with self._lock:
            self._is_closed = True
            self._has_moved.notify_all()
        self._inbox.put(None)

    def join(self, timeout: float | None = _EXIT_S) -> None:
        """Wait until the thread has ended; after `close`, that is at its next token."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    @property
    def _is_open(self) -> bool:
        return not self._is_closed and self.failure is None

    def _closed_error(self) -> EngineClosedError:
        if self.failure is not None:
            error = EngineClosedError(f"the engine has failed: {in_one_line(self.failure)}", hint="load it anew")
            error.__cause__ = self.failure
            return error
        return EngineClosedError("the engine is closed", hint="make a new one")

    # --- in the thread

    def _run(self) -> None:
        try:
            while self._receive():
                self._advance()
        except BaseException as error:
            self._fail(error)
        finally:
            self._threads.close()

    def _receive(self) -> bool:
        """Take in new requests, waiting for one when there is nothing to do; False: the thread ends."""
        try:
            wait_s = _IDLE_S if self.decoder.is_idle and not self._is_closed else 0.0
            item = self._inbox.get(timeout=wait_s)
            while True:
                if item is not None:
                    request, mailbox = item
                    self._deliveries[id(request)] = _Delivery(mailbox)
                    self.decoder.submit(request)
                item = self._inbox.get_nowait()
        except queue.Empty:
            pass
        if self._is_closed:
            self._tell_all(EngineClosedError("the engine was closed before the reply was finished"))
            self.decoder.abort()
        with self._lock:  # nobody can submit between this look and the end of the thread
            self._has_moved.notify_all()
            self._is_running = not self.decoder.is_idle or not self._inbox.empty()
            return self._is_running

    def _advance(self) -> None:
        """Run one step of the decoder and deliver the updates."""
        self._drop_cancelled()
        if self.decoder.is_idle:
            return
        try:
            with self._threads.observed():
                done = self.decoder.step()
        except Exception as error:
            self._tell_all(described(error, "the engine"))
            self.decoder.abort()  # it starts clean, or fails for good
            return
        for sequence in (*self.decoder.scheduler.live, *done):
            delivery = self._deliveries[id(sequence.request)]
            if not delivery.mailbox.is_cancelled:
                self._update(delivery, sequence)
        for sequence in done:
            del self._deliveries[id(sequence.request)]

    def _update(self, delivery: _Delivery, sequence: Sequence) -> None:
        try:
            delivery.update(sequence)
        except Exception as error:  # a text that can't be read, a mailbox that takes nothing: this request's own
            sequence.fail(described(error, "delivering this reply"))
            _deliver(delivery.mailbox, sequence.error)
            delivery.mailbox.is_cancelled = True

    def _drop_cancelled(self) -> None:
        scheduler = self.decoder.scheduler
        for sequence in scheduler.live:
            sequence.is_cancelled |= self._deliveries[id(sequence.request)].mailbox.is_cancelled
        for waiting in [w for w in scheduler.waiting if self._deliveries[id(w.request)].mailbox.is_cancelled]:
            scheduler.waiting.remove(waiting)
            del self._deliveries[id(waiting.request)]

    def _tell_all(self, error: MaraError) -> None:
        """End every request that was received with an error."""
        deliveries, self._deliveries = self._deliveries, {}
        for delivery in deliveries.values():
            _deliver(delivery.mailbox, error)
            delivery.mailbox.is_cancelled = True

    def _fail(self, error: BaseException) -> None:
        """End the worker for good: everybody who waits, now or later, gets the error."""
        _log.error("the decoder has failed for good: %s", in_one_line(error))
        with self._lock:
            self.failure = error
            self._is_running = False
            self._has_moved.notify_all()
        self._tell_all(self._closed_error())
        while True:
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                return
            if item is not None:
                _deliver(item[1], self._closed_error())


def _deliver(mailbox: Mailbox, news: News | None) -> None:
    """Deliver an update or error; a failure of the mailbox must not keep the worker from serving others."""
    try:
        if news is not None:
            mailbox.deliver(news)
    except Exception:
        _log.exception("a mailbox does not accept its updates")


@atexit.register
def _end_threads() -> None:
    """Wait for the threads: one that is inside torch when the interpreter ends would abort the process."""
    workers = list(_workers)
    for worker in workers:
        worker.close()
    for worker in workers:
        worker.join()
