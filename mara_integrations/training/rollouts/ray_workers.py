"""Rollout workers on Ray: actors with a model each; an actor that is lost is replaced.

Its batch is generated again from the same seed, and only a batch that arrives whole counts, so that no reply is lost or
counted twice.
"""

from __future__ import annotations

import copy
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from typing_extensions import override

from mara_integrations.errors import ConfigError, EngineClosedError, MaraError
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.runtime import backend_of
from mara_integrations.training.rollouts.ray_cluster import MAX_LOSSES, first_line, import_ray
from mara_integrations.training.rollouts.replies import OnReply, Reply
from mara_integrations.training.rollouts.workers import PendingReplies, RolloutBatch, RolloutWorkers


class _Actor:
    """One model in a process of its own."""

    def __init__(self, spec: ModelSpec, num_threads: int) -> None:
        torch.set_num_threads(num_threads)  # as many as in the main process: sums end in the same digits
        self._model = load_model(spec)
        self._backend = backend_of(self._model)

    def generate(self, batch: RolloutBatch) -> list[Reply]:
        if batch.head is not None:
            batch.head.to(self._model.device)
        return batch.generate(self._model, self._backend)


@dataclass(slots=True)
class _Task:
    """A batch that waits for an actor, or that one works on."""

    batch: RolloutBatch
    on_reply: OnReply
    losses: int = 0
    replies: list[Reply] | None = None


class RayWorkers(RolloutWorkers):
    """Actors on the cluster of RAY_ADDRESS, or on one that is started here.

    Args:
        spec: The model that each actor loads.
        count: Number of actors.
        on_gpu: Whether each actor takes a whole GPU.
        say: Called with a line of text when an actor is lost.

    Attributes:
        actors: Ray's handles of the live actors.

    Raises:
        MissingExtraError: If Ray is not installed.
        ConfigError: If the cluster has fewer GPUs than actors.
    """

    def __init__(self, spec: ModelSpec, count: int, on_gpu: bool, say: Callable[[str], None]) -> None:
        self._ray, self._spec, self._num_gpus, self._say = import_ray(), spec, int(on_gpu), say
        self._owns_cluster = not self._ray.is_initialized()
        if self._owns_cluster:
            os.environ.setdefault("RAY_worker_niceness", "0")  # training waits for the actors: no background work
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
            self._ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        num_gpus = self._ray.cluster_resources().get("GPU", 0)
        if on_gpu and num_gpus < count:
            raise ConfigError(
                f"ray={count} is not allowed: each process takes a GPU, and the cluster has {num_gpus:.0f}",
                hint="ask for as many processes as there are GPUs, or train with --device cpu",
            )
        self._waiting: deque[_Task] = deque()
        self._running: dict[Any, tuple[_Task, Any]] = {}  # Ray's reference -> task, actor
        self.actors = [self._start_actor() for _ in range(count)]
        self._idle = list(self.actors)

    def _start_actor(self) -> Any:
        # No CPU is booked: an actor that waits for a free one would wait for ever, without a word.
        actor = self._ray.remote(num_cpus=0, num_gpus=self._num_gpus)(_Actor)
        return actor.remote(self._spec, torch.get_num_threads())

    @property
    @override
    def num_workers(self) -> int:
        return len(self.actors)

    @override
    def submit(self, batch: RolloutBatch, on_reply: OnReply) -> PendingReplies:
        if batch.head is not None:
            batch = replace(batch, head=copy.deepcopy(batch.head).cpu())  # training goes on changing the head
        task = _Task(batch, on_reply)
        self._waiting.append(task)
        self._assign()
        return partial(self._result, task)

    def _assign(self) -> None:
        while self._idle and self._waiting:
            actor, task = self._idle.pop(), self._waiting.popleft()
            self._running[actor.generate.remote(task.batch)] = task, actor

    def _result(self, task: _Task) -> list[Reply]:
        while task.replies is None:
            (ready,), _ = self._ray.wait(list(self._running), num_returns=1)
            self._finish(ready)
            self._assign()
        return task.replies

    def _finish(self, reference: Any) -> None:
        """Take what an actor returned; replace the actor if it was lost."""
        task, actor = self._running.pop(reference)
        try:
            task.replies = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            task.losses += 1
            if task.losses >= MAX_LOSSES:
                raise EngineClosedError(
                    f"{MAX_LOSSES} actors in a row were lost while they generated the same replies: "
                    f"{first_line(error)}",
                    hint="see Ray's logs; an actor may lack memory",
                ) from None
            self._say("  [yellow]an actor was lost; another one generates its replies[/]")
            self.actors.remove(actor)
            self.actors.append(actor := self._start_actor())
            self._waiting.appendleft(task)
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, MaraError) else error) from None
        else:
            task.on_reply(len(task.replies))
        self._idle.append(actor)

    @override
    def close(self) -> None:
        for actor in self.actors:
            self._ray.kill(actor)
        if self._owns_cluster:
            self._ray.shutdown()
