"""`ServerEngine`: replies of a model in `mara-tools serve`, `vllm serve` or another server of OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NoReturn

from typing_extensions import Self, Unpack, override

from mara_integrations.engine.choose_engine import EngineChoice
from mara_integrations.engine.generation import Generation
from mara_integrations.engine.request import Request
from mara_integrations.engine.settings import DecodingSettings, RequestSettings, check_settings, resolve_settings
from mara_integrations.engine.tickets import Mailbox, Ticket
from mara_integrations.engine.workers import EngineStatus
from mara_integrations.errors import ConfigError
from mara_integrations.heads.source import HeadSource, head_name
from mara_integrations.messages import Prompt
from mara_integrations.models.load import ModelSpec, Outline
from mara_integrations.remote.calls import ServerCall, make_call
from mara_integrations.remote.connection import Address, Connection, ServedModel
from mara_integrations.remote.replies import ServerGeneration, updates
from mara_integrations.runtime import MARAEngine

if TYPE_CHECKING:
    from openai import AsyncOpenAI


class ServerEngine(MARAEngine):
    """Gated generation on a model in a server, through OpenAI's client.

    It answers as a `MARAEngine` does. What needs the model's weights or tokenizer in this process raises a
    `ConfigError`: `verify`, `compare`, `encode`, `request`, `model`, `head`, and `trace=True`.

    ```python
    with ServerEngine(Address.of("http://127.0.0.1:8000"), "smollm2", "brand") as engine:
        engine.generate("Which plan has email support?", max_new_tokens=100).text
    ```

    Args:
        address: Where the server is, and how to ask it.
        model: Name of the model; None is the first that the server lists.
        head: Name of a head that the server has, or several as a list or a mapping to weights; None is the base model.
        system_prompt: See `MARAEngine`.
        **defaults: See `MARAEngine`. Of what neither they nor a call gives, the server's own defaults hold; but
            `temperature` is 0 and `max_new_tokens` 512, as in this process.

    Raises:
        ConfigError: If a default is unknown, out of bounds, or nothing that a server can do.
        MissingExtraError: If the extra `client` is not installed.
    """

    def __init__(
        self,
        address: Address,
        model: str | None = None,
        head: HeadSource | None = None,
        *,
        system_prompt: str | None = None,
        **defaults: Unpack[DecodingSettings],
    ) -> None:
        if model is not None and not isinstance(model, str):
            raise ConfigError(f"model={model!r:.80} can't be sent to a server", hint="name it as the server does")
        self._connection = Connection(address, model)
        self.model_source, self.limits = model, None
        self._set({"head": head, "system_prompt": system_prompt, **defaults})

    def _set(self, defaults: dict[str, Any]) -> None:
        check_settings(defaults)
        self.defaults = defaults
        self._call("?", {})  # refuses what no server can do

    @property
    @override
    def _is_vllm(self) -> bool:
        return False  # not in this process

    @property
    def address(self) -> Address:
        """Where the server is, and how it is asked."""
        return self._connection.address

    @override
    def with_settings(self, **settings: Unpack[RequestSettings]) -> ServerEngine:
        twin = object.__new__(ServerEngine)
        twin._connection, twin.model_source, twin.limits = self._connection, self.model_source, None
        twin._set({**self.defaults, **settings})
        return twin

    # --- the server ---

    @override
    def load(self) -> Self:
        """Ask the server for its model now instead of on first use; returns itself.

        Raises:
            ModelError: If the server has no such model.
            ServerError: If it can't be reached, or refuses the key.
            EngineClosedError: If the engine is closed.
        """
        _ = self.served
        return self

    @property
    def served(self) -> ServedModel:
        """What the server says of the model."""
        return self._connection.ask(self._connection.model)

    @override
    def close(self) -> None:
        self._connection.close()

    @property
    def spec(self) -> ModelSpec:
        """The model as it was named; without a name, the server's address stands for it."""
        return ModelSpec(self.model_source or self.address.base_url)

    @property
    def runs_on(self) -> EngineChoice:
        """The server."""
        return EngineChoice("server", f"the model runs in {self.address.base_url}")

    @property
    def outline(self) -> Outline:
        """Context window; the tokenizer is the server's."""
        return Outline(None, self.served.context_window)

    @property
    def is_loaded(self) -> bool:
        """Whether the server was asked for its model."""
        return self._connection.served is not None

    @property
    def status(self) -> EngineStatus:
        """Whether requests can expect an answer, as far as is known here; asks nothing."""
        return EngineStatus(self.is_loaded, is_healthy=not self._connection.is_closed)

    @property
    def system_prompt(self) -> str | None:
        """The system prompt that is sent; None leaves it to the server, which may put in the head's."""
        prompt: str | None = self.defaults.get("system_prompt")
        return prompt

    @override
    def _leased(self) -> NoReturn:
        raise ConfigError(
            f"the model runs in {self.address.base_url}: its weights and its tokenizer are not in this process",
            hint="for this, leave base_url out and run the model here",
        )

    # --- replies ---

    @override
    def report(
        self, generation: Generation, *, has_trace: bool = True, top_logprobs: int | None = None
    ) -> dict[str, Any]:
        assert isinstance(generation, ServerGeneration)
        return generation.report()

    @override
    def log_prob_settings(self, top_logprobs: int) -> dict[str, Any]:
        return {"top_logprobs": top_logprobs}

    @override
    def _prepared(self, prompt: Prompt | Request, settings: RequestSettings) -> Callable[[Ticket], object]:
        if isinstance(prompt, Request):
            raise ConfigError("a Request is for a model in this process", hint="give the prompt and its settings")
        call = self._call(prompt, settings)

        def submit(ticket: Ticket) -> None:
            mailbox = ticket.mailbox
            self._connection.start(lambda client: self._deliver(client, call, mailbox), mailbox)

        return submit

    def _call(self, prompt: Prompt, settings: RequestSettings) -> ServerCall:
        told: dict[str, Any] = {**settings}
        top_logprobs = told.pop("top_logprobs", None)  # of `log_prob_settings`
        resolved = resolve_settings(told, self.defaults, place=lambda _: None)
        return make_call(prompt, resolved, self.given(**told), top_logprobs)

    async def _deliver(self, client: AsyncOpenAI, call: ServerCall, mailbox: Mailbox) -> None:
        served = await self._connection.model(client)
        body = call.body(served.name, served.kind)
        if "vllm_xargs" in body["extra_body"]:
            await self._connection.require_plug_in(client)
        create: Any = client.chat.completions.create if call.is_chat else client.completions.create
        async with await create(**body) as chunks, aclosing(updates(chunks, must_call=call.must_call)) as news:
            async for update in news:
                if mailbox.is_cancelled:
                    return
                mailbox.deliver(update)

    # --- copies ---

    def __repr__(self) -> str:
        shown = {"model": self.model_source, **self.defaults, "head": head_name(self.head_source)}
        parts = [f"{name}={value!r}" for name, value in shown.items() if value is not None]
        return f"ServerEngine({', '.join([repr(self.address.base_url), *parts])})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.address, self.model_source, self.defaults)


def _rebuild(address: Address, model: str | None, defaults: dict[str, Any]) -> ServerEngine:
    return ServerEngine(address, model, **defaults)
