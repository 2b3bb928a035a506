"""The decoder whose forwards, batches and sampling are vLLM's; the worker drives it as it drives `Decoder`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

from typing_extensions import override

from mara_integrations.engine.backends.protocol import RowSize
from mara_integrations.engine.faults import described
from mara_integrations.engine.generation import Generation, LogProbs
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.engine.request import Request
from mara_integrations.engine.scheduler import Scheduler, Waiting
from mara_integrations.engine.sequence import NO_ROW, Position, Sequence
from mara_integrations.engine.vllm_requests import check_vllm_limits, check_vllm_request, vllm_params
from mara_integrations.errors import ConfigError, MaraError, ModelError, in_one_line
from mara_integrations.models.vllm.load import VLLMModel


class VLLMSequence(Sequence):
    """A request that vLLM decodes, and the part of its reply that came.

    Attributes:
        name: Its name in vLLM.
        alternatives: The most probable tokens at each position, where the request asks for them.
    """

    def __init__(self, request: Request, name: str) -> None:
        super().__init__(request, NO_ROW)
        self.name = name
        self.alternatives: list[LogProbs] = []

    def take(self, output: Any) -> None:
        """Append the tokens of a `CompletionOutput` with what came since the last one."""
        for token_id, log_probs in zip(output.token_ids, output.logprobs, strict=True):
            if self.finish_reason is not None:  # a stop string came before
                return
            self.alternatives.append(_ranked(log_probs, self.request.top_logprobs or 0))
            self.stats.fed += 1
            self._take(Position([token_id], [log_probs[token_id].logprob], [0.0], 0.0), 0, "base")
        if output.finish_reason == "error":
            self.fail(ModelError("vLLM ended this request with an error", hint="its log says more"))
        elif output.finish_reason is not None and self.finish_reason is None:
            self._finish("length" if output.finish_reason == "length" else "stop")

    @override
    def result(self) -> Generation:
        generation = super().result()
        if self.request.top_logprobs is None:
            return generation
        return replace(generation, alternatives=tuple(self.alternatives))


class VLLMDecoder:
    """Decodes requests by vLLM, each with its own head and settings. Not thread-safe: see `worker.Worker`.

    Args:
        model: The model.
        limits: How many replies are decoded together, and how many wait; memory is vLLM's own business.

    Raises:
        ConfigError: If a limit is one that vLLM sets itself.
    """

    def __init__(self, model: VLLMModel, limits: EngineLimits | None = None) -> None:
        check_vllm_limits(limits)
        self.limits = limits or EngineLimits()
        self.scheduler = Scheduler(max_live=self.limits.max_live)
        self._model = model
        self._sequences: dict[str, VLLMSequence] = {}  # those that vLLM has, by name
        self._numbers = itertools.count()
        self._failure: Exception | None = None

    def check(self, request: Request) -> None:
        """Refuse a request that vLLM can't decode; may be called in any thread.

        Raises:
            ConfigError: See `check_vllm_request`.
        """
        check_vllm_request(request)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ConfigError: See `check`.
        """
        self.check(request)
        self.scheduler.waiting.append(Waiting(request, RowSize(0, 0), [], keeps_prefix=False))

    @property
    def is_idle(self) -> bool:
        """Nothing is live or waiting."""
        return not self.scheduler.waiting and not self.scheduler.live

    @property
    def is_failing(self) -> bool:
        """VLLM has failed, and takes nothing more."""
        return self._failure is not None

    def step(self) -> list[Sequence]:
        """Run one step of vLLM; returns the sequences that have finished.

        Raises:
            Exception: If vLLM itself failed; `abort` comes next.
        """
        while self.scheduler.waiting and len(self.scheduler.live) < self.scheduler.max_live:
            self._start(self.scheduler.waiting.popleft().request)
        try:
            outputs = self._model.step() if self._sequences else []
        except Exception as error:
            self._failure = error
            raise
        for output in outputs:
            self._take(output)
        done = self.scheduler.retire()
        self._forget(done)
        return done

    def abort(self) -> None:
        """Drop everything that is live or waiting.

        Raises:
            ModelError: If a step has failed: vLLM can't be used any more then.
        """
        live = self.scheduler.clear()
        if self._failure is not None:
            raise ModelError(f"vLLM failed: {in_one_line(self._failure)}") from self._failure
        self._forget(live)

    def _start(self, request: Request) -> None:
        sequence = VLLMSequence(request, f"mara-{id(self)}-{next(self._numbers)}")
        self.scheduler.live.append(sequence)
        try:
            params = vllm_params(request, self._model.heads_folder)
            self._model.add(sequence.name, request.prompt_ids, params)
        except Exception as error:
            sequence.fail(_refusal(error))
        else:
            self._sequences[sequence.name] = sequence

    def _take(self, output: Any) -> None:
        """Hand a `RequestOutput` to its sequence."""
        sequence = self._sequences.get(output.request_id)
        if sequence is None:  # it was aborted in this step
            return
        try:
            sequence.take(output.outputs[0])
        except Exception as error:  # its text can't be followed: the request's own fault
            sequence.fail(described(error, "following the text of this reply"))
        if output.finished:
            del self._sequences[sequence.name]

    def _forget(self, sequences: Seq[Sequence]) -> None:
        """Tell vLLM that these need no more tokens, as far as it does not know."""
        names = [one.name for one in sequences if isinstance(one, VLLMSequence) and one.name in self._sequences]
        for name in names:
            del self._sequences[name]
        if names:
            self._model.abort(names)


def _ranked(log_probs: Any, count: int) -> LogProbs:
    """Return the most probable of a position's tokens, of which vLLM tells the one taken too."""
    ranked = sorted(log_probs.items(), key=lambda item: item[1].rank)[:count]
    return tuple((token_id, told.logprob) for token_id, told in ranked)


def _refusal(error: Exception) -> MaraError:
    """Return vLLM's refusal of a request as our error; its errors of validation are ValueErrors."""
    if isinstance(error, ValueError) and not isinstance(error, MaraError):
        ours = ConfigError(in_one_line(error))
        ours.__cause__ = error
        return ours
    return described(error, "vLLM's start of this request")
