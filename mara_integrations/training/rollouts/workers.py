"""Rollout workers: generate replies for training, in this process, or in others (`ray_workers`).

A batch holds everything that decides its replies, so that they are the same wherever it is generated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from typing_extensions import override

from mara_integrations.engine.backends.protocol import Backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Conversation
from mara_integrations.models.load import LoadedModel
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.training.rollouts.decisions import taken_rank
from mara_integrations.training.rollouts.replies import OnReply, Reply, sample_replies

PendingReplies: TypeAlias = Callable[[], list[Reply]]  # waits for the replies of a batch; to be called once


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """Replies to generate together.

    Attributes:
        prompts: Conversations, with the system prompt.
        sampling: Sampling settings of every reply.
        seed: Seed of the first reply; each further reply has the next one.
        replies_per_prompt: Number of replies to each prompt.
        head: Head that gates the replies; what it is shown is kept with each reply. None is the base model.
        gate: Settings of the gate; None is the default of the head's form.
    """

    prompts: Sequence[Conversation]
    sampling: SamplingParams
    seed: int
    replies_per_prompt: int = 1
    head: MARAHead | None = None
    gate: GateParams | None = None

    def generate(self, model: LoadedModel, backend: Backend, on_reply: OnReply | None = None) -> list[Reply]:
        """Generate the replies here, prompt by prompt.

        The decoder is a new one: it adapts to what it decodes, and replies must not depend on earlier batches.
        """
        replies = sample_replies(
            model,
            Decoder(backend),
            self.prompts,
            sampling=self.sampling,
            replies_per_prompt=self.replies_per_prompt,
            seed=self.seed,
            head=self.head,
            gate=self.gate,
            keep_positions=self.head is not None,
            on_reply=on_reply,
        )
        if self.head is not None and self.head.config.form != "paper":  # drop candidates that were fed and not visited
            for reply in replies:
                for position in reply.positions:
                    position.states = position.states[: taken_rank(reply, position) + 1]
        return replies


class RolloutWorkers(Protocol):
    """Generates batches."""

    @property
    def num_workers(self) -> int:
        """Number of batches that are generated at once."""

    def submit(self, batch: RolloutBatch, on_reply: OnReply) -> PendingReplies:
        """Start a batch, with its head as it is now; `on_reply` is called with counts of finished replies."""

    def close(self) -> None:
        """Release all processes and models."""


class LocalWorker(RolloutWorkers):
    """Generates in this process: a batch is finished when `submit` returns."""

    def __init__(self, model: LoadedModel, backend: Backend) -> None:
        self._model, self._backend = model, backend

    @property
    @override
    def num_workers(self) -> int:
        return 1

    @override
    def submit(self, batch: RolloutBatch, on_reply: OnReply) -> PendingReplies:
        replies = batch.generate(self._model, self._backend, on_reply)
        return lambda: replies

    @override
    def close(self) -> None:
        pass


class Prefetch:
    """Batches of a list that are started before they are needed, so that all workers are busy.

    Args:
        workers: Generate the batches.
        batches: The list.
        on_reply: Called with counts of finished replies.
    """

    def __init__(self, workers: RolloutWorkers, batches: Sequence[RolloutBatch], on_reply: OnReply) -> None:
        self._workers, self._batches, self._on_reply = workers, batches, on_reply
        self._pending: dict[int, PendingReplies] = {}

    def start(self, indices: Iterable[int]) -> None:
        """Start those of the batches that were not started yet."""
        for index in indices:
            if index not in self._pending:
                self._pending[index] = self._workers.submit(self._batches[index], self._on_reply)

    def result(self, index: int) -> list[Reply]:
        """Return the replies of a batch, and start it if nobody did."""
        self.start([index])
        return self._pending.pop(index)()
