"""Tickets: a caller holds one while the decoder works on its request, and receives the updates of the reply from it."""

from __future__ import annotations

import asyncio
import copy
import queue
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass
from typing import TypeAlias

from typing_extensions import override

from mara_integrations.engine.generation import FinishReason, Generation
from mara_integrations.errors import MaraError
from mara_integrations.replies.calls import Call, Piece


@dataclass(frozen=True, slots=True)
class Update:
    """The part of a reply that was added since its last update.

    Attributes:
        raw_text: Text as the model wrote it, as far as it is certain; may be empty.
        token_ids: Tokens taken.
        pieces: That text, read: thoughts, parts of the answer, and parts of tool calls.
        calls: The tool calls read so far, each with the arguments written so far.
        generation: The whole reply, on the last update only.
    """

    raw_text: str
    token_ids: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    calls: tuple[Call, ...] = ()
    generation: Generation | None = None

    @classmethod
    def whole(cls, generation: Generation) -> Update:
        """Return a finished reply as a single update."""
        pieces = [Piece(thoughts=generation.thoughts)] if generation.thoughts else []
        pieces += [Piece(generation.text)] if generation.text else []
        pieces += [Piece(call=call) for call in generation.calls]
        return cls(generation.raw_text, generation.token_ids, tuple(pieces), generation.calls, generation)

    @property
    def text(self) -> str:
        """The part of the answer in this update; may be empty."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def thoughts(self) -> str:
        """The part of the thoughts in this update; may be empty."""
        return "".join(piece.thoughts for piece in self.pieces)

    @property
    def has_news(self) -> bool:
        """Whether there is anything to read; a token may be held back while it may become a stop string."""
        return bool(self.raw_text or self.pieces) or self.generation is not None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the reply ended; None while it goes on."""
        return None if self.generation is None else self.generation.finish_reason


News: TypeAlias = "Update | MaraError"


class Mailbox(ABC):
    """Receives the updates of one reply from the worker, and tells the worker whether anybody still waits for them."""

    def __init__(self) -> None:
        self.is_cancelled = False
        self.on_cancel: Callable[[], object] | None = None  # for who can't look at the mailbox while it works

    def cancel(self) -> None:
        """Say that nobody waits any more; may be called in any thread, and more than once."""
        self.is_cancelled = True
        if self.on_cancel is not None:
            self.on_cancel()

    @abstractmethod
    def deliver(self, news: News) -> None:
        """Deliver an update, or the error that ended the request; called in the decoder's thread."""


class Ticket(ABC):
    """A submitted request, in the hands of the caller who waits for its reply.

    Leaving the loop over it early, closing the iterator, cancelling the task or dropping the ticket stops the
    generation at its next token.
    """

    mailbox: Mailbox

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for the reply any more."""
        return self.mailbox.is_cancelled

    def cancel(self) -> None:
        """Stop the generation at its next token; no more updates come."""
        self.mailbox.cancel()

    def __del__(self) -> None:  # the worker holds the mailbox only, so this runs when the caller has gone
        self.cancel()


class _ThreadMailbox(Mailbox):
    def __init__(self) -> None:
        super().__init__()
        self.news: queue.SimpleQueue[News] = queue.SimpleQueue()

    @override
    def deliver(self, news: News) -> None:
        self.news.put(news)


class ThreadTicket(Ticket):
    """A ticket to wait for with `for`."""

    def __init__(self) -> None:
        self.mailbox: _ThreadMailbox = _ThreadMailbox()

    def __iter__(self) -> Generator[Update, None, None]:
        """Wait for updates, blocking.

        Raises:
            MaraError: The error that ended the request.
        """
        try:
            while True:
                update = _checked(self.mailbox.news.get())
                yield update
                if update.generation is not None:
                    return
        finally:
            self.cancel()


class _LoopMailbox(Mailbox):
    def __init__(self) -> None:
        super().__init__()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.news: asyncio.Queue[News] = asyncio.Queue()

    @override
    def deliver(self, news: News) -> None:
        assert self.loop is not None, "the ticket is bound to a loop first"
        try:
            self.loop.call_soon_threadsafe(self.news.put_nowait, news)
        except RuntimeError:  # the loop was closed: nobody waits any more
            self.is_cancelled = True


class LoopTicket(Ticket):
    """A ticket to wait for with `async for`, in the event loop that it was bound to."""

    def __init__(self) -> None:
        self.mailbox: _LoopMailbox = _LoopMailbox()

    def bind(self) -> None:
        """Have updates delivered to the running event loop."""
        self.mailbox.loop = asyncio.get_running_loop()

    async def __aiter__(self) -> AsyncGenerator[Update, None]:
        """Wait for updates without blocking the event loop; raises as `ThreadTicket.__iter__` does."""
        try:
            while True:
                update = _checked(await self.mailbox.news.get())
                yield update
                if update.generation is not None:
                    return
        finally:
            self.cancel()


def _checked(news: News) -> Update:
    """Return an update; raise an error as a copy, since several callers may get the same failure."""
    if isinstance(news, Update):
        return news
    raise copy.copy(news) from news.__cause__
