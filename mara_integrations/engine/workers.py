"""The one worker of each loaded model, and the leases by which engines hold a model and its worker."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from mara_integrations.engine.backends.protocol import Backend
from mara_integrations.engine.choose_engine import EngineChoice, choose_engine, is_gguf_file, log_choice
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.engine.request import Request
from mara_integrations.engine.tickets import Ticket
from mara_integrations.engine.worker import AnyDecoder, Worker
from mara_integrations.errors import ConfigError, EngineClosedError, UnsupportedModelError
from mara_integrations.heads.source import heads
from mara_integrations.models.load import LoadedModel, ModelSpec, Outline, load_model, read_outline
from mara_integrations.models.openmp import release_threads

_log = logging.getLogger(__name__)
_Ticket = TypeVar("_Ticket", bound=Ticket)
_Read = TypeVar("_Read")


@dataclass(eq=False, slots=True)
class _Shared:
    """The state that engines on one loaded model share.

    Attributes:
        lock: Held while the worker is made or given up. That takes seconds, and nobody waits for another model's.
        worker: The worker; None until it is asked for.
        leases: The open leases of the model.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    worker: Worker | None = None
    leases: weakref.WeakSet[ModelLease] = field(default_factory=weakref.WeakSet)


_all_shared: weakref.WeakKeyDictionary[LoadedModel, _Shared] = weakref.WeakKeyDictionary()
_lock = threading.Lock()  # of this dictionary alone


def _shared_by_users_of(model: LoadedModel) -> _Shared:
    with _lock:
        return _all_shared.setdefault(model, _Shared())


def backend_of(model: LoadedModel, limits: EngineLimits | None = None) -> Backend:
    """Make a backend on a loaded model. Only that of its engine is imported: others take seconds, or other packages.

    Args:
        model: The model.
        limits: How much memory the backend sets aside, if it does so when it is made.

    Raises:
        ConfigError: See `LlamaCppBackend`; or if it is on vLLM, which has its own.
        ModelError: See `make_backend`, `SpreadBackend` and `LlamaCppBackend`.
    """
    if model.engine == "vllm":
        raise ConfigError(
            f"model {model.name!r} is on vLLM, which shows no hidden states here", hint="use engine='transformers'"
        )
    if model.engine == "llama.cpp":
        from mara_integrations.engine.backends.llama_cpp import LlamaCppBackend

        return LlamaCppBackend(model.model, limits)
    if model.parts is not None:
        from mara_integrations.engine.backends.tensor_parallel import SpreadBackend

        return SpreadBackend(model.parts, model.name)
    from mara_integrations.engine.backends.select import make_backend

    return make_backend(model.model, model.name)


def worker_for(model: LoadedModel, limits: EngineLimits | None = None) -> Worker:
    """Return the worker of a loaded model; it is made on first use, once, whatever threads ask at that time.

    Args:
        model: The loaded model.
        limits: How much memory and work the worker takes on; None accepts any.

    Raises:
        ConfigError: If the worker runs with other limits already.
    """
    shared = _shared_by_users_of(model)
    with shared.lock:
        if shared.worker is None:
            on_cpu = model.engine != "vllm" and model.device.type == "cpu"
            shared.worker = Worker(_decoder_of(model, limits), on_cpu=on_cpu)
        worker = shared.worker
    if limits is not None and worker.limits != limits:
        mine, theirs = limits.model_dump(), worker.limits.model_dump()
        name = next(name for name in mine if mine[name] != theirs[name])
        raise ConfigError(
            f"{name}={mine[name]!r}, but model {model.name!r} is running already, with {name}={theirs[name]!r}",
            hint="engines on one model share its limits: close the others first, or give all of them the same",
        )
    if limits is not None and limits.head_cache_bytes is not None:
        heads.max_bytes = limits.head_cache_bytes
    return worker


def _decoder_of(model: LoadedModel, limits: EngineLimits | None) -> AnyDecoder:
    if model.engine == "vllm":
        from mara_integrations.engine.vllm_decoder import VLLMDecoder

        return VLLMDecoder(model.model, limits)
    return Decoder.measured(backend_of(model, limits), limits)


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """The present state of an engine.

    Attributes:
        is_loaded: Whether the model is in memory.
        is_healthy: Whether requests can expect an answer; also before the model is loaded.
        num_live: Requests that are being decoded.
        num_waiting: Requests that wait to be decoded.
    """

    is_loaded: bool
    is_healthy: bool
    num_live: int = 0
    num_waiting: int = 0


class ModelLease:
    """An engine's hold on a base model and its worker, both loaded on first use; thread-safe.

    Engines that name one model share it and its worker. When the last lease is closed, the worker ends, and the memory
    of its copies and caches is given back; that of the weights too, unless the caller holds the model.

    Attributes:
        spec: The model, as the caller named it.
        limits: How much memory and work its worker takes on; None takes the worker as it is.
        is_closed: Whether `close` was called.
    """

    def __init__(self, spec: ModelSpec, limits: EngineLimits | None = None) -> None:
        self.spec = spec
        self.limits = limits
        self.is_closed = False
        self._lock = threading.Lock()
        self._choice: EngineChoice | None = None
        self._model: LoadedModel | None = None
        self._outline: LoadedModel | Outline | None = None
        self._tickets: weakref.WeakSet[Ticket] = weakref.WeakSet()

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._model is not None

    @property
    def runs_on(self) -> EngineChoice:
        """The engine that runs the model, and why; loads nothing."""
        if self._choice is None:
            self._choice = choose_engine(self.spec, self.limits)
        return self._choice

    @property
    def status(self) -> EngineStatus:
        """The present state of the worker; loads nothing."""
        model = self._model
        worker = None if model is None else _shared_by_users_of(model).worker
        if worker is None:
            return EngineStatus(self.is_loaded, is_healthy=not self.is_closed)
        is_healthy = worker.is_healthy and not self.is_closed
        return EngineStatus(self.is_loaded, is_healthy, worker.num_live, worker.num_waiting)

    @property
    def model(self) -> LoadedModel:
        """The base model.

        Raises:
            ConfigError: See `load_model`.
            ModelError: If the model can't be found or driven.
            EngineClosedError: If the lease is closed.
        """
        with self._lock:
            self._check_open()
            if self._model is None:
                start = time.perf_counter()
                model = self._read(load_model)
                shared = _shared_by_users_of(model)
                with shared.lock:
                    shared.leases.add(self)
                self._model = model
                took_s = time.perf_counter() - start
                _log.info("%s on %s, %s, ready in %.1f s", model.name, model.device, model.number_format, took_s)
            return self._model

    @property
    def worker(self) -> Worker:
        """The worker of the model; loads it. The thread that asks releases its own threads of OpenMP to it.

        Raises:
            ConfigError: See `worker_for`.
            MaraError: See `model`.
        """
        model = self.model
        worker = worker_for(model, self.limits)
        release_threads()
        if self.is_closed:  # while the worker was made
            self._give_up_worker(model)
            self._check_open()
        return worker

    @property
    def outline(self) -> LoadedModel | Outline:
        """Tokenizer and context window; the weights are not loaded for them where small files tell.

        Raises:
            MaraError: See `model`.
        """
        self._check_open()
        if self._model is not None:
            return self._model
        if self._outline is None:
            self._outline = self._read(read_outline)
        return self._outline

    def _read(self, read: Callable[[ModelSpec], _Read]) -> _Read:
        """Read the model for the engine that was chosen.

        What `auto` has given to llama.cpp, and is of a kind that llama.cpp can't run, is read for transformers.
        """
        spec, choice = self.spec, self.runs_on
        if spec.engine != "auto" or not is_gguf_file(spec.model):
            return read(spec)
        log_choice(str(spec.model), choice)
        if choice.name == "transformers":
            return read(spec)
        try:
            return read(replace(spec, engine="llama.cpp"))
        except UnsupportedModelError as error:
            if spec.model_kwargs:  # settings of llama.cpp
                raise
            self._choice = EngineChoice("transformers", error.message)
            log_choice(str(spec.model), self._choice)
            return read(spec)

    def submit(self, request: Request, ticket: _Ticket) -> _Ticket:
        """Queue a request; its updates go to the ticket. See `Worker.submit`.

        Raises:
            EngineClosedError: If the lease is closed.
        """
        worker = self.worker
        with self._lock:
            self._check_open()
            self._tickets.add(ticket)
        worker.submit(request, ticket)
        if self.is_closed:  # in the meantime
            self._end(ticket)
        return ticket

    def close(self) -> None:
        """End what runs, take no more requests, and give the memory back; see the class."""
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = True
            model, self._model, self._outline = self._model, None, None
            tickets = list(self._tickets)
        for ticket in tickets:
            self._end(ticket)
        if model is None:
            return
        self._give_up_worker(model)
        device = model.device
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _give_up_worker(self, model: LoadedModel) -> None:
        """Let go of the model's worker, and end it if this was the last lease."""
        shared = _shared_by_users_of(model)
        with shared.lock:
            shared.leases.discard(self)
            worker = None if shared.leases else shared.worker
            if worker is not None:
                shared.worker = None
        if worker is not None:
            worker.close()
            worker.join()

    def _check_open(self) -> None:
        if self.is_closed:
            raise EngineClosedError("the engine is closed", hint="make a new one")

    def _end(self, ticket: Ticket) -> None:
        ticket.cancel()
        ticket.mailbox.deliver(EngineClosedError("the engine was closed before the reply was finished"))
