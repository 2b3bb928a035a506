"""The engine as an object: base model, head and defaults; messages or text in, a reply out, from any thread or loop.

Knows no framework.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from typing_extensions import Self, Unpack

from mara_integrations.engine.answers import answer_report, log_prob_report
from mara_integrations.engine.build_request import build_request, check_prompt, prepared
from mara_integrations.engine.choose_engine import EngineChoice
from mara_integrations.engine.generation import Generation
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.engine.replying import Replying
from mara_integrations.engine.request import Request
from mara_integrations.engine.settings import (
    DecodingSettings,
    RequestSettings,
    ResolvedSettings,
    check_settings,
    overlay,
    resolve_settings,
)
from mara_integrations.engine.tickets import Ticket
from mara_integrations.engine.vllm_requests import check_vllm_limits, check_vllm_settings
from mara_integrations.engine.workers import EngineStatus, ModelLease, backend_of, worker_for
from mara_integrations.errors import ConfigError
from mara_integrations.fingerprints import same_model
from mara_integrations.heads.compose import Head
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.source import HeadSource, base_model_of, head_weights, heads, place_heads
from mara_integrations.messages import Prompt
from mara_integrations.models.load import LoadedModel, ModelSpec, Outline
from mara_integrations.models.options import EngineName, Quantization
from mara_integrations.models.resolve import alias_of

if TYPE_CHECKING:
    from mara_integrations.engine.oracle.drift import Drift
    from mara_integrations.engine.oracle.verify import Verification

__all__ = ["MARAEngine", "backend_of", "worker_for"]


class MARAEngine(Replying):
    """Gated generation on a local model.

    ```python
    with MARAEngine("smollm2", "heads/brand-voice", max_new_tokens=100) as engine:
        engine.generate("Which plan has email support?").text  # a user's message
        engine.generate([Message("system", "Be brief."), Message("user", "Hi!")])
        engine.generate("Once upon a time", raw=True)  # text to continue, without the chat template
        for update in engine.stream("Hi!", head=None, temperature=0.7):  # every call may say other settings
            print(update.text, end="")
    ```

    Model and head are loaded on first use, or by `load`. Engines that name one model share it and decode together.

    Args:
        model: Hub id, local folder, `.gguf` file, alias, or a loaded `(model, tokenizer)`; None is the model that the
            head records.
        head: A head, its folder, a published `.pth` actor, or a Hub id; None is the base model. Several, as a list or a
            mapping to weights, are composed: their corrections of the base model add.
        device: `auto` is CUDA, then MPS, then CPU.
        dtype: `auto` is bfloat16 on GPUs that have it, float32 on CPU. There `bfloat16` is faster on processors with
            instructions for it (AVX512-BF16, AMX).
        revision: Branch, tag or commit of a model on the Hub.
        model_kwargs: Arguments for `from_pretrained`, as for quantisation or `device_map`; for llama.cpp `n_ctx`,
            `n_gpu_layers` and `n_threads`; for vLLM its engine arguments, as `max_model_len`.
        quantization: `int8` is for the CPU: a quarter of the memory for linear layers, and faster.
        engine: Name of the engine that runs the model. `llama.cpp` runs `.gguf` files in their own quantisation. `vllm`
            runs vLLM in this process, and takes heads of the `q` form only. `auto` is llama.cpp for a `.gguf` file
            that is named by its path, see `choose_engine`, else `transformers`; `runs_on` tells which.
        limits: How much memory and work the engine takes on: how many replies are decoded together, and the bytes of
            keys and values, of kept prompts and of heads. Engines on one model share its limits.
        system_prompt: Text put before every conversation that brings no system message. None is the one that the head
            was trained with; an empty text turns it off.
        **defaults: Fields of `SamplingParams` and `GateParams` that every request starts from; what holds in the end
            is told by `resolve_settings`.

    Raises:
        ConfigError: If neither a model nor a head is named, or a default is unknown or out of bounds. Everything else
            is raised on first use, or by `load`.

    Attributes:
        model_source: The model as it was named; None where the head names it. See also `spec`.
        limits: As given.
        defaults: Settings that every request starts from, by name.
    """

    def __init__(
        self,
        model: Any = None,
        head: HeadSource | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        quantization: Quantization | None = None,
        engine: EngineName = "auto",
        limits: EngineLimits | None = None,
        system_prompt: str | None = None,
        **defaults: Unpack[DecodingSettings],
    ) -> None:
        if model is None and head is None:
            raise ConfigError(
                "no base model is named",
                hint="name one with model='smollm2' (--model smollm2), or give a head that records its own",
            )
        self.defaults: dict[str, Any] = {"head": head, "system_prompt": system_prompt, **defaults}
        self.model_source = model
        self._loading: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "revision": revision,
            "model_kwargs": dict(model_kwargs or {}),
            "quantization": quantization,
            "engine": engine,
        }
        self.limits = limits
        self._check(self.defaults)
        self._lease: ModelLease | None = None if model is None else self._leased_as(model)
        self._lock = threading.Lock()

    def with_settings(self, **settings: Unpack[RequestSettings]) -> MARAEngine:
        """Return an engine on the same loaded model, with some defaults changed.

        Raises:
            ConfigError: If a setting is unknown or out of bounds.
        """
        twin = object.__new__(MARAEngine)
        twin.defaults = {**self.defaults, **settings}
        twin.model_source, twin._loading, twin.limits = self.model_source, self._loading, self.limits
        twin._check(twin.defaults)
        twin._lease, twin._lock = self._leased(), threading.Lock()
        return twin

    def _check(self, settings: dict[str, Any]) -> None:
        """Refuse settings that no request could run with, on this engine.

        Raises:
            ConfigError: If a name is unknown, a value is out of bounds, or nothing that vLLM can do.
        """
        check_settings(settings)
        if self._is_vllm:
            check_vllm_limits(self.limits)
            check_vllm_settings(settings)

    @property
    def _is_vllm(self) -> bool:
        source = self.model_source
        return self._loading["engine"] == "vllm" or (isinstance(source, LoadedModel) and source.engine == "vllm")

    # --- the model ---

    def load(self) -> Self:
        """Load model and head now instead of on first use; returns itself.

        Raises:
            ModelError: If the model can't be found or driven.
            HeadError: If the head can't be read or does not fit the model.
            EngineClosedError: If the engine is closed.
        """
        _ = self.model, self._leased().worker
        self._place(self.head_source)
        return self

    def close(self) -> None:
        """End what runs, and give back the memory of model, caches and decoder thread.

        What other engines on the same model do goes on. Later calls raise `EngineClosedError`.
        """
        self._leased().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def spec(self) -> ModelSpec:
        """The model as it was named, or as the head names it."""
        return self._leased().spec

    @property
    def runs_on(self) -> EngineChoice:
        """The engine that runs the model, as `auto` was resolved, and why; loads no model."""
        return self._leased().runs_on

    @property
    def model(self) -> LoadedModel:
        """The base model, loaded on first access."""
        lease = self._leased()
        if not lease.is_loaded:
            for source in head_weights(self.head_source):  # a missing one is found out before a model is loaded
                if not isinstance(source, MARAHead):
                    heads.get(source)
        return lease.model

    @property
    def outline(self) -> LoadedModel | Outline:
        """Tokenizer and context window; the weights are not loaded for them where small files tell."""
        return self._leased().outline

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._lease is not None and self._lease.is_loaded

    @property
    def status(self) -> EngineStatus:
        """The present state of the engine; loads nothing."""
        return EngineStatus(is_loaded=False, is_healthy=True) if self._lease is None else self._lease.status

    @property
    def head_source(self) -> HeadSource | None:
        """The default head, as it was named."""
        source: HeadSource | None = self.defaults["head"]
        return source

    @property
    def system_prompt(self) -> str | None:
        """The system prompt that a conversation gets where neither it nor its call brings one."""
        return self.resolve().system_prompt

    @property
    def head(self) -> Head | None:
        """The default head, on the model's device."""
        return self._place(self.head_source)

    # --- reports and checks ---

    def report(
        self, generation: Generation, *, has_trace: bool = True, top_logprobs: int | None = None
    ) -> dict[str, Any]:
        """Return what a finished reply says about itself, as plain JSON; see `answer_report`.

        Args:
            generation: The reply.
            has_trace: Whether the report has the trace, where the reply has one.
            top_logprobs: Alternatives that it tells at each token; None reports no log-probabilities. The request needs
                `log_prob_settings`.
        """
        shown = generation if has_trace else replace(generation, trace=None)
        report = answer_report(shown, self.model)
        if top_logprobs is not None:
            report["logprobs"] = log_prob_report(generation, self.model, top_logprobs)
        return report

    def log_prob_settings(self, top_logprobs: int) -> dict[str, Any]:
        """Return the settings of a request whose report tells log-probabilities; see `report`."""
        return {"top_logprobs": top_logprobs} if self._is_vllm else {"trace": True}  # they are read from it

    def verify(self, prompt: Prompt, **settings: Unpack[RequestSettings]) -> Verification:
        """Decode a prompt with both the engine and the slow reference; stop strings are ignored.

        Returns:
            Both replies, and the first place where they differ; `holds` unless that is more than noise.

        Raises:
            ConfigError: If a grammar holds the reply, or several processes the model: the reference knows neither. Else
                as `generate`.
        """
        from mara_integrations.engine.oracle.models import reference_model
        from mara_integrations.engine.oracle.verify import verify

        request = self.request(prompt, **settings)
        if request.constraint is not None:
            raise ConfigError(
                "the reference knows no tools, schemas or forbidden words", hint="verify the prompt without them"
            )
        seed = 0 if request.sampling.seed is None else request.sampling.seed
        request = replace(request, text=None, sampling=request.sampling.updated(seed=seed))
        return verify(reference_model(self.model), request, self.generate(request).token_ids)

    def compare(self, other: MARAEngine, prompt: Prompt, **settings: Unpack[RequestSettings]) -> Drift:
        """Let another engine read this one's reply too: what quantisation or a number format changes.

        ```python
        MARAEngine("m.gguf", engine="llama.cpp").compare(MARAEngine("m.gguf", engine="transformers"), "Hi!")
        ```

        Raises:
            ConfigError: If the other engine runs another model, or several processes hold one of them. Else as
                `generate`.
        """
        from mara_integrations.engine.oracle.drift import drift
        from mara_integrations.engine.oracle.models import reference_model

        request = self.request(prompt, **settings)
        if same_model(self.model.fingerprint, other.model.fingerprint) is False:
            raise ConfigError(f"{self.model.name!r} and {other.model.name!r} are different models")
        models = reference_model(self.model), reference_model(other.model)
        return drift(*models, request.prompt_ids, self.generate(request).token_ids)

    # --- what a request is made of ---

    def resolve(self, **settings: Unpack[RequestSettings]) -> ResolvedSettings:
        """Return what holds for a request with these settings; see `resolve_settings`."""
        if self._is_vllm:
            check_vllm_settings(overlay(settings, self.defaults))
        return resolve_settings(settings, self.defaults, self._place)

    def given(self, **settings: Unpack[RequestSettings]) -> dict[str, Any]:
        """Return a call's settings over the engine's own, without what the head brings; loads nothing."""
        return overlay(settings, self.defaults)

    def encode(self, prompt: Prompt, **settings: Unpack[RequestSettings]) -> list[int]:
        """Return the token ids of a prompt, as `generate` feeds them."""
        resolved = self.resolve(**settings)
        return self.model.encoder.encode(prepared(prompt, resolved), resolved.form.tools)

    def request(self, prompt: Prompt, **settings: Unpack[RequestSettings]) -> Request:
        """Return what `generate` submits to the decoder; it can be submitted once. See there for errors."""
        check_prompt(prompt)
        told: dict[str, Any] = {**settings}
        top_logprobs = told.pop("top_logprobs", None) if self._is_vllm else None  # of `log_prob_settings`
        resolved = self.resolve(**told)
        return build_request(self.model, prompt, resolved, top_logprobs)

    def _prepared(self, prompt: Prompt | Request, settings: RequestSettings) -> Callable[[Ticket], object]:
        """Check all of a request, and return what submits it."""
        if isinstance(prompt, Request) and settings:
            raise ConfigError("a request that is made already takes no settings", hint="give them to `request`")
        request = prompt if isinstance(prompt, Request) else self.request(prompt, **settings)
        return lambda ticket: self._leased().submit(request, ticket)

    def _place(self, source: HeadSource | None) -> Head | None:
        weights = head_weights(source)
        if not weights:
            return None
        model = self.model
        return place_heads(weights, model.device, model.hidden_size, model.name, model.fingerprint)

    def _leased(self) -> ModelLease:
        with self._lock:
            if self._lease is None:
                assert self.head_source is not None
                self._lease = self._leased_as(alias_of(base_model_of(self.head_source)))
            return self._lease

    def _leased_as(self, model: Any) -> ModelLease:
        return ModelLease(ModelSpec(model, **self._loading), self.limits)

    # --- copies ---

    def __repr__(self) -> str:
        from mara_integrations.heads.source import head_name

        lease = self._lease
        state = "closed" if lease and lease.is_closed else "loaded" if self.is_loaded else "not loaded"
        parts = [repr(self.model_source)] if isinstance(self.model_source, str) else []
        shown = {**self.defaults, "head": head_name(self.head_source)}
        parts += [f"{name}={value!r}" for name, value in shown.items() if value is not None]
        return f"MARAEngine({', '.join(parts)})  # {state}"

    def __deepcopy__(self, memo: dict[int, Any]) -> MARAEngine:
        return self  # frameworks copy their objects freely; weights are not copied with them

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.model_source, {**self._loading, "limits": self.limits, **self.defaults})


def _rebuild(model: Any, arguments: dict[str, Any]) -> MARAEngine:
    return MARAEngine(model, **arguments)
