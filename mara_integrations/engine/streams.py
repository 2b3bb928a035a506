"""Generators that stop a generation as soon as they are closed or dropped."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any, TypeVar

Item = TypeVar("Item")


class Stream(Generator[Item, None, None]):
    """A generator that stops a generation when it is closed or dropped, also before its first item.

    A plain generator that was never started runs no `finally`.

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

    A plain async generator is closed only at the event loop's next turn. And if a framework keeps the exception that it
    was closed with, that exception's frames keep all generators inside it alive, so these are never closed.

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
