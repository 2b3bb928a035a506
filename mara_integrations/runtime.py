"""The engine as an object: base model, head, defaults; text or messages in, text out, from any thread or event loop.

Knows no framework. Loading happens on first use; one loaded model and one decoder thread serve all that name it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

from mara_integrations.engine.backends.protocol import Backend
from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.backends.tensor_parallel import SpreadBackend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.gate import check_strength
from mara_integrations.engine.generation import Generation
from mara_integrations.engine.grammar import Grammar
from mara_integrations.engine.oracle.verify import Verification, verify
from mara_integrations.engine.request import Request
from mara_integrations.engine.worker import AsyncStream, LoopTicket, ThreadTicket, Ticket, Update, Worker
from mara_integrations.errors import ConfigError, ContextLengthError
from mara_integrations.heads.compose import Head, candidate_settings
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.source import HeadSource, head_weights, heads, place_heads
from mara_integrations.messages import Conversation, Message, Prompt, Tool
from mara_integrations.models.load import LoadedModel, ModelSpec, Outline, load_model, read_outline
from mara_integrations.models.options import Quantization
from mara_integrations.replies.forms import CallSyntax, ReplyForm, syntax_of
from mara_integrations.replies.reasoning import CLOSE, OPEN, Thoughts
from mara_integrations.replies.text import TextStream
from mara_integrations.sampling import GateParams, SamplingParams

_Ticket = TypeVar("_Ticket", bound=Ticket)


_workers: weakref.WeakKeyDictionary[LoadedModel, Worker] = weakref.WeakKeyDictionary()
_workers_lock = threading.Lock()


def backend_of(model: LoadedModel) -> Backend:
    """A backend on a loaded model.

    Raises:
        ModelError: See `make_backend` and `SpreadBackend`.
    """
    return make_backend(model.model, model.name) if model.parts is None else SpreadBackend(model.parts, model.name)


def worker_for(model: LoadedModel) -> Worker:
    """The one worker of a loaded model."""
    with _workers_lock:
        if model not in _workers:
            _workers[model] = Worker(Decoder.measured(backend_of(model)))
        return _workers[model]


class MARAEngine:
    """Gated generation on a local model.

    Args:
        model: Hub id, local folder, `.gguf` file, alias, or a loaded `(model, tokenizer)`.
        head: A head, its folder, a published `.pth` actor, or a Hub id; None is the base model. Several, as a list or a
            mapping to weights, are composed: their corrections of the base model add.
        device: `auto` is CUDA, then MPS, then CPU.
        dtype: `auto` is bfloat16 on GPUs that have it, float32 on CPU.
        revision: Of a model on the Hub.
        model_kwargs: Passed to `from_pretrained`, as for quantisation or `device_map`.
        quantization: `int8` is for the CPU: a quarter of the memory for linear layers, and faster.
        system_prompt: Put before every conversation that brings no system message.
        **defaults: Fields of `SamplingParams` and `GateParams` that every request starts from.

    Raises:
        ConfigError: If a default is unknown or out of bounds. Everything else is raised on first use, or by `load`.
    """

    def __init__(
        self,
        model: Any = "smollm2",
        head: HeadSource | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        quantization: Quantization | None = None,
        system_prompt: str | None = None,
        **defaults: Any,
    ) -> None:
        self.spec = ModelSpec(model, device, dtype, revision, dict(model_kwargs or {}), quantization)
        self.head_source = head
        self.system_prompt = system_prompt
        self.defaults = defaults
        _split(defaults)
        self._loaded: LoadedModel | None = None
        self._outline: LoadedModel | Outline | None = None
        self._lock = threading.Lock()

    def load(self) -> MARAEngine:
        """Load model and head now instead of on first use; returns itself.

        Raises:
            ModelError: If the model can't be found or driven.
            HeadError: If the head can't be read or does not fit the model.
        """
        worker_for(self.model)
        self._head(self.head_source)
        return self

    @property
    def model(self) -> LoadedModel:
        """The base model, loaded on first access."""
        with self._lock:
            if self._loaded is None:
                for source in head_weights(self.head_source):  # a missing one is found out before a model is loaded
                    if not isinstance(source, MARAHead):
                        heads.get(source)
                self._loaded = load_model(self.spec)
        return self._loaded

    @property
    def outline(self) -> LoadedModel | Outline:
        """Tokenizer and context window: of the loaded model, else without its weights where small files tell them."""
        if self._loaded is not None:
            return self._loaded
        if self._outline is None:
            self._outline = read_outline(self.spec)
        return self._outline

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._loaded is not None

    @property
    def head(self) -> Head | None:
        """The default head, on the model's device."""
        return self._head(self.head_source)

    def generate(self, prompt: Prompt, **overrides: Any) -> Generation:
        """Generate one reply.

        Args:
            prompt: A conversation, raw text (no chat template), or token ids.
            **overrides: Fields of `SamplingParams` and `GateParams`, `head`, `system_prompt`, and `form` (`ReplyForm`).

        Raises:
            ConfigError: If an override is unknown or out of bounds, or the prompt does not fit the model.
            ModelError: See `load`.
            HeadError: See `load`.
        """
        return _last(self._submit(prompt, overrides, ThreadTicket()))

    def stream(self, prompt: Prompt, **overrides: Any) -> Generator[Update, None, None]:
        """Generate one reply token by token; see `generate`. The last update carries the whole `Generation`."""
        return iter(self._submit(prompt, overrides, ThreadTicket()))

    def generate_batch(self, prompts: Sequence[Prompt], **overrides: Any) -> list[Generation]:
        """Generate a reply to each prompt, decoded together; the same replies as one by one."""
        tickets = [self._submit(prompt, overrides, ThreadTicket()) for prompt in prompts]
        try:
            return [_last(ticket) for ticket in tickets]
        finally:
            for ticket in tickets:
                ticket.cancel()

    async def agenerate(self, prompt: Prompt, **overrides: Any) -> Generation:
        """`generate` without blocking the event loop; cancelling the task stops the generation."""
        async for update in self.astream(prompt, **overrides):
            if update.generation is not None:
                return update.generation
        raise AssertionError("a stream ends with its generation")

    def astream(self, prompt: Prompt, **overrides: Any) -> AsyncStream[Update]:
        """`stream` without blocking the event loop; dropped or closed, it stops the generation at its next token."""
        ticket = LoopTicket()
        return AsyncStream(self._updates(prompt, overrides, ticket), ticket.cancel)

    async def _updates(
        self, prompt: Prompt, overrides: dict[str, Any], ticket: LoopTicket
    ) -> AsyncGenerator[Update, None]:
        import asyncio

        ticket.bind()
        try:  # submitting may load a model, compile a grammar, or wait for room
            async for update in await asyncio.to_thread(self._submit, prompt, overrides, ticket):
                yield update
        finally:
            ticket.cancel()

    def verify(self, prompt: Prompt, **overrides: Any) -> Verification:
        """Decode a prompt with the engine and with the slow reference, whatever stop strings say.

        Returns:
            Both replies, and the first place where they differ; `holds` unless that is more than noise.

        Raises:
            ConfigError: If a grammar holds the reply, or several processes the model: the reference knows neither. Else
                as `generate`.
        """
        request = self.request(prompt, **{"seed": 0, **self.defaults, **overrides})
        if request.constraint is not None:
            raise ConfigError("the reference knows no tools or schemas", hint="verify the prompt without them")
        if self.model.parts is not None:
            raise ConfigError("the reference knows no model that is spread over processes", hint="verify in one")
        request = replace(request, text=None)
        return verify(
            self.model.model, request, _last(worker_for(self.model).submit(request, ThreadTicket())).token_ids
        )

    def encode(self, prompt: Prompt, system_prompt: str | None = None, tools: Sequence[Tool] = ()) -> list[int]:
        """Token ids of a prompt, as `generate` feeds them."""
        system_prompt = self.system_prompt if system_prompt is None else system_prompt
        if not isinstance(prompt, str | Conversation) and len(prompt) > 0 and isinstance(prompt[0], Message):
            prompt = Conversation(tuple(cast(Sequence[Message], prompt)))
        if isinstance(prompt, Conversation):
            prompt = prompt.with_system(system_prompt)
        return self.model.encoder.encode(prompt, tools)

    def request(self, prompt: Prompt, **overrides: Any) -> Request:
        """What `generate` submits to the decoder; see there for arguments and errors."""
        overrides = {**self.defaults, **overrides}
        head = self._head(overrides.pop("head", self.head_source))
        form = overrides.pop("form", None) or ReplyForm()
        prompt_ids = self.encode(prompt, overrides.pop("system_prompt", None), form.tools)
        sampling_values, gate_values = _split(overrides)
        gate = GateParams.of(**gate_values)
        if head is not None:
            check_strength(head.config.form, gate)
            if gate.strength > 0:  # what the head was trained with, unless the request says otherwise
                sampling_values = candidate_settings(head, sampling_values)
        sampling = SamplingParams.of(**sampling_values)
        room = self.model.context_window - len(prompt_ids)
        if not prompt_ids:
            raise ConfigError("the prompt has no tokens", hint="give it some text")
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(prompt_ids)} tokens; this model's maximum context length is "
                f"{self.model.context_window} tokens, the reply included",
                hint="shorten the prompt",
            )
        stop = (*sampling.stop, *self.model.encoder.stop_for(prompt))
        shown = (OPEN, CLOSE, *(self._syntax.tags if form.tools else ()))
        sampling = sampling.updated(max_new_tokens=min(sampling.max_new_tokens, room))
        return Request(
            prompt_ids=prompt_ids,
            sampling=sampling,
            gate=gate,
            head=head,
            eos_token_ids=self.model.eos_token_ids,
            text=TextStream(self.model.tokenizer, stop, shown),
            constraint=self._constraint(form, sampling.max_new_tokens),
        )

    def _constraint(self, form: ReplyForm, budget: int) -> Grammar | None:
        model = self.model
        thoughts = thoughts_of(model)
        grammar = form.grammar(self._syntax, thoughts)
        if grammar is None:
            return None
        vocab_size = model.model.get_output_embeddings().out_features
        return Grammar(
            grammar,
            tokenizer=model.tokenizer,
            vocab_size=vocab_size,
            eos_token_ids=model.eos_token_ids,
            budget=budget,
            thoughts=thoughts,
        )

    @property
    def _syntax(self) -> CallSyntax:
        return syntax_of(getattr(self.model.tokenizer, "chat_template", None))

    def _submit(self, prompt: Prompt, overrides: dict[str, Any], ticket: _Ticket) -> _Ticket:
        return worker_for(self.model).submit(self.request(prompt, **overrides), ticket)

    def _head(self, source: HeadSource | None) -> Head | None:
        weights = head_weights(source)
        return place_heads(weights, self.model.device, self.model.hidden_size, self.model.name) if weights else None

    def __deepcopy__(self, memo: dict[int, Any]) -> MARAEngine:
        return self  # frameworks copy their objects freely; weights are not copied with them

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.spec, self.head_source, self.system_prompt, self.defaults)


def thoughts_of(model: LoadedModel) -> Thoughts:
    """Where the model's chat template leaves a reply when it begins."""
    if OPEN not in str(getattr(model.tokenizer, "chat_template", None)):
        return "none"
    prompt = model.encoder.render([Message("user", "?")]).rstrip()
    if prompt.endswith(CLOSE):  # it was told not to think
        return "none"
    return "begun" if prompt.endswith(OPEN) else "possible"


def _rebuild(spec: ModelSpec, head: Any, system_prompt: str | None, defaults: dict[str, Any]) -> MARAEngine:
    settings: dict[str, Any] = {
        "device": spec.device,
        "dtype": spec.dtype,
        "revision": spec.revision,
        "model_kwargs": spec.model_kwargs,
        "quantization": spec.quantization,
    }
    return MARAEngine(spec.model, head, system_prompt=system_prompt, **settings, **defaults)


def _split(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of a request by what they concern, checked; an unknown one is refused."""
    gate = {name: value for name, value in values.items() if name in GateParams.model_fields}
    sampling = {name: value for name, value in values.items() if name not in gate}
    unknown = sorted(set(sampling) - set(SamplingParams.model_fields))
    if unknown:
        allowed = sorted({*SamplingParams.model_fields, *GateParams.model_fields})
        raise ConfigError(
            f"{unknown[0]}={sampling[unknown[0]]!r} is no setting", hint=f"settings are {', '.join(allowed)}"
        )
    SamplingParams.of(**sampling)
    GateParams.of(**gate)
    return sampling, gate


def _last(ticket: ThreadTicket) -> Generation:
    for update in ticket:
        if update.generation is not None:
            return update.generation
    raise AssertionError("a stream ends with its generation")
