"""The ways to ask for replies: one, token by token, several together, and without blocking an event loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TypeVar

from typing_extensions import Unpack

from mara_integrations.engine.generation import Generation
from mara_integrations.engine.request import Request
from mara_integrations.engine.settings import RequestSettings
from mara_integrations.engine.streams import AsyncStream, Stream
from mara_integrations.engine.tickets import LoopTicket, ThreadTicket, Ticket, Update
from mara_integrations.messages import Prompt

_Ticket = TypeVar("_Ticket", bound=Ticket)


class Replying(ABC):
    """Replies in all their forms, over one method: `_prepared` checks a request and returns what submits it."""

    @abstractmethod
    def _prepared(self, prompt: Prompt | Request, settings: RequestSettings) -> Callable[[Ticket], object]:
        """Check all of a request, and return what submits it."""

    def generate(self, prompt: Prompt | Request, **settings: Unpack[RequestSettings]) -> Generation:
        """Generate one reply.

        Args:
            prompt: A user's message as a string (with `raw=True`, text to continue), a list of messages, a
                `Conversation`, or token ids; or what `request` made of one.
            **settings: Settings of this call; see `RequestSettings` and `resolve_settings`.

        Raises:
            ConfigError: If a setting is unknown or out of bounds, or the prompt is empty or does not fit the model.
            ModelError: See `load`.
            HeadError: See `load`.
            EngineClosedError: If the engine is closed, or is closed before the reply is finished.
        """
        return _last(self._submit(prompt, settings, ThreadTicket()))

    def stream(self, prompt: Prompt | Request, **settings: Unpack[RequestSettings]) -> Stream[Update]:
        """Generate one reply token by token; see `generate`. The last update carries the whole `Generation`.

        Closed or dropped, the stream stops the generation at its next token.
        """
        ticket = self._submit(prompt, settings, ThreadTicket())
        return Stream(iter(ticket), ticket.cancel)

    def generate_batch(
        self, prompts: Sequence[Prompt | Request], **settings: Unpack[RequestSettings]
    ) -> list[Generation]:
        """Generate a reply to each prompt, decoded together; the same replies as one by one.

        Nothing is decoded when a prompt is refused, and nothing is left running when a reply fails; see `generate`.
        """
        prepared = [self._prepared(prompt, settings) for prompt in prompts]
        tickets: list[ThreadTicket] = []
        try:
            for submit in prepared:
                submit(ticket := ThreadTicket())
                tickets.append(ticket)
            return [_last(ticket) for ticket in tickets]
        finally:
            for ticket in tickets:
                ticket.cancel()

    async def agenerate(self, prompt: Prompt | Request, **settings: Unpack[RequestSettings]) -> Generation:
        """`generate` without blocking the event loop; cancelling the task stops the generation."""
        async for update in self.astream(prompt, **settings):
            if update.generation is not None:
                return update.generation
        raise AssertionError("a stream ends with its generation")

    def astream(self, prompt: Prompt | Request, **settings: Unpack[RequestSettings]) -> AsyncStream[Update]:
        """`stream` without blocking the event loop."""
        ticket = LoopTicket()
        return AsyncStream(self._updates(prompt, settings, ticket), ticket.cancel)

    async def _updates(
        self, prompt: Prompt | Request, settings: RequestSettings, ticket: LoopTicket
    ) -> AsyncGenerator[Update, None]:
        import asyncio

        ticket.bind()
        try:  # submitting may load a model, compile a grammar, or wait for room
            async for update in await asyncio.to_thread(self._submit, prompt, settings, ticket):
                yield update
        finally:
            ticket.cancel()

    def _submit(self, prompt: Prompt | Request, settings: RequestSettings, ticket: _Ticket) -> _Ticket:
        self._prepared(prompt, settings)(ticket)
        return ticket


def _last(ticket: ThreadTicket) -> Generation:
    for update in ticket:
        if update.generation is not None:
            return update.generation
    raise AssertionError("a stream ends with its generation")
