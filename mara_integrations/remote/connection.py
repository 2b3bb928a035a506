"""The connection to one server: a client of OpenAI, and the event loop in which all its requests run.

One loop in one thread serves every caller, whatever thread or loop they are in: connections are reused by all of them,
and a request is cancelled at once, also while the server has not answered yet.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

from mara_integrations.engine.tickets import Mailbox
from mara_integrations.errors import ConfigError, EngineClosedError, MaraError, MissingExtraError, ModelError
from mara_integrations.remote.calls import ServerKind, kind_of

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_T = TypeVar("_T")
_Work: TypeAlias = "Callable[[AsyncOpenAI], Coroutine[Any, Any, _T]]"
_CLOSING_S = 5.0
# A context window for servers that do not tell theirs: small, so that prompts which are packed by it fit.
_UNKNOWN_WINDOW = 4096
# No server has a head of this name.
_NO_HEAD = "mara-integrations:is-the-plug-in-there"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a server says of the model that is asked for.

    Attributes:
        name: Its name in requests.
        kind: The kind of the server.
        context_window: Most tokens of prompt and reply together.
    """

    name: str
    kind: ServerKind
    context_window: int


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is, and how to ask it; see `ServerEngine`."""

    base_url: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float | None = None
    max_retries: int | None = None

    @classmethod
    def of(
        cls,
        base_url: str,
        api_key: str | None = None,
        timeout: float | None = None,
        max_retries: int | None = None,
    ) -> Address:
        """Return an address, checked; a URL without a path gets `/v1`.

        Raises:
            ConfigError: If the URL is none of HTTP, or holds a password.
        """
        try:
            url = urlsplit(base_url)
            is_address = url.scheme in ("http", "https") and bool(url.hostname)
            _ = url.port  # raises, unless it is a port
        except ValueError:
            is_address = False
        if not is_address:
            raise ConfigError(f"base_url={base_url!r} is not an address", hint="such as http://127.0.0.1:8000/v1")
        if url.username or url.password:
            raise ConfigError("base_url holds a password, and addresses are shown", hint="give api_key=")
        if url.path in ("", "/"):
            url = url._replace(path="/v1")
        return cls(url.geturl().rstrip("/"), api_key, timeout, max_retries)


class Connection:
    """The client of one server; connects on first use.

    Args:
        address: Where the server is.
        model: Name of the model; None is the first that the server lists.
    """

    def __init__(self, address: Address, model: str | None) -> None:
        if find_spec("openai") is None:
            raise MissingExtraError("base_url needs openai", hint="pip install 'mara-integrations[client]'")
        self.address, self._model = address, model
        self.served: ServedModel | None = None
        self.is_closed = False
        self._has_plug_in = False
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: AsyncOpenAI | None = None
        self._running: dict[Future[None], Mailbox] = {}

    def start(self, work: _Work[None], mailbox: Mailbox) -> None:
        """Begin to answer a request; the answer goes to the mailbox.

        Args:
            work: Asks the server and delivers its updates; its errors are delivered for it.
            mailbox: Where they go. When it is cancelled, the request ends.

        Raises:
            EngineClosedError: If the connection is closed.
        """
        with self._lock:
            client, loop = self._connected()
            future = asyncio.run_coroutine_threadsafe(self._delivering(work, client, mailbox), loop)
            self._running[future] = mailbox
        future.add_done_callback(lambda done: self._running.pop(done, None))
        mailbox.on_cancel = future.cancel
        if mailbox.is_cancelled:  # meanwhile
            future.cancel()

    def ask(self, work: _Work[_T]) -> _T:
        """Run `work` and wait for its result, blocking; its errors are ours."""
        with self._lock:
            client, loop = self._connected()
            future = asyncio.run_coroutine_threadsafe(work(client), loop)
        try:
            return future.result()
        except Exception as error:
            raise self._ours(error) from error.__cause__
        finally:
            future.cancel()

    async def model(self, client: AsyncOpenAI) -> ServedModel:
        """Return what the server says of the model; it is asked once.

        Raises:
            ModelError: If it lists no models and none is named, or a server that lists all of its models does not list
                the one that is named.
        """
        if self.served is None:
            import openai

            try:
                models = {model.id: model for model in (await client.models.list()).data}
            except openai.APIStatusError as error:
                if error.status_code not in (404, 405) or self._model is None:
                    raise
                models = {}  # some gateways list none
            if self._model is None and not models:
                raise ModelError(f"{self.address.base_url} lists no models", hint="name one, as model='...'")
            first = next(iter(models), "")
            listed = models.get(self._model or first, models.get(first))
            window = (listed.model_extra or {}).get("max_model_len") if listed else None
            kind = kind_of(listed.owned_by if listed else None)
            if kind != "other" and self._model is not None and self._model not in models:
                raise ModelError(f"model {self._model!r} is not served", hint=f"models are {', '.join(models)}")
            self.served = ServedModel(self._model or first, kind, window or _UNKNOWN_WINDOW)
        return self.served

    async def require_plug_in(self, client: AsyncOpenAI) -> None:
        """Ask a vLLM once whether it refuses a head that it can't have: without our plug-in it ignores every head.

        Raises:
            ConfigError: If it answers.
        """
        if self._has_plug_in:
            return
        import openai

        served = await self.model(client)
        try:
            await client.completions.create(
                model=served.name, prompt="?", max_tokens=1, extra_body={"vllm_xargs": {"mara_head": _NO_HEAD}}
            )
        except openai.APIStatusError as error:
            if error.status_code not in (400, 404, 422):
                raise
            self._has_plug_in = True
            return
        raise ConfigError(
            f"the vLLM of {self.address.base_url} has no plug-in for heads, and would answer without one",
            hint="pip install mara-integrations where it runs",
        )

    def close(self) -> None:
        """End all requests, and close the connections; whoever waits gets `EngineClosedError`."""
        with self._lock:
            self.is_closed = True
            running, self._running = self._running, {}
            client, self._client = self._client, None
        for future, mailbox in running.items():
            mailbox.deliver(EngineClosedError("the engine was closed before the reply was finished"))
            future.cancel()
        if client is not None and self._loop is not None and self._loop.is_running():
            asyncio.run_coroutine_threadsafe(client.close(), self._loop).result(_CLOSING_S)

    def _connected(self) -> tuple[AsyncOpenAI, asyncio.AbstractEventLoop]:
        if self.is_closed:
            raise EngineClosedError("the engine is closed", hint="make a new one")
        loop = _client_loop()
        if self._client is None or loop is not self._loop:
            self._client, self._loop = _client_of(self.address), loop
            weakref.finalize(self, _close_later, self._client, loop).atexit = False
        return self._client, loop

    async def _delivering(self, work: _Work[None], client: AsyncOpenAI, mailbox: Mailbox) -> None:
        try:
            await work(client)
        except Exception as error:
            mailbox.deliver(self._ours(error))

    def _ours(self, error: Exception) -> MaraError:
        from mara_integrations.remote.errors import as_our_error  # imports the client

        return as_our_error(error, self.address.base_url)


def _client_of(address: Address) -> AsyncOpenAI:
    import openai

    settings = {"timeout": address.timeout, "max_retries": address.max_retries}
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    key = address.api_key or os.environ.get("MARA_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none"
    return openai.AsyncOpenAI(base_url=address.base_url, api_key=key, **given)


# --- the event loop, one of the process

_lock = threading.Lock()
_thread: _LoopThread | None = None


class _LoopThread(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name="mara-client", daemon=True)
        self.loop = asyncio.new_event_loop()

    def run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()


def _client_loop() -> asyncio.AbstractEventLoop:
    """Return the loop; a process that was forked has the object, but not its thread."""
    global _thread
    with _lock:
        if _thread is None or not _thread.is_alive():
            _thread = _LoopThread()
            _thread.start()
        return _thread.loop


def _close_later(client: AsyncOpenAI, loop: asyncio.AbstractEventLoop) -> None:
    if loop.is_running():
        loop.call_soon_threadsafe(lambda: loop.create_task(client.close()))
