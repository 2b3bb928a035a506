"""Replies written on Ray by actors with a model each; one that is lost is replaced.

What was under way on a lost actor is written again from its own seed, and only a part that arrived whole counts, so
that no episode is lost or counted twice.
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

from mara_integrations.engine.backends.select import make_backend
from mara_integrations.errors import ConfigError, EngineClosedError, MaraError
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.training.rollouts.replies import OnReply, Reply
from mara_integrations.training.rollouts.writers import Part, Promise, Writers
from mara_integrations.training.scoring.ray_rewards import MAX_LOSSES, first_line, import_ray


class _WriterActor:
    """One model in a process of its own."""

    def __init__(self, spec: ModelSpec, num_threads: int) -> None:
        torch.set_num_threads(num_threads)  # as many as in the learner's process: sums end in the same digits
        self._model = load_model(spec)
        self._backend = make_backend(self._model.model, self._model.name)

    def write(self, part: Part) -> list[Reply]:
        if part.head is not None:
            part.head.to(self._model.device)
        return part.write(self._model, self._backend)

    def pid(self) -> int:
        return os.getpid()


@dataclass(slots=True)
class _Work:
    """A part on its way."""

    part: Part
    on_reply: OnReply
    losses: int = 0
    replies: list[Reply] | None = None


class RayWriters(Writers):
    """Actors that write, `count` of them, on the cluster of RAY_ADDRESS or on one started here.

    Args:
        spec: The model each loads.
        count: Actors.
        on_gpu: Each takes a whole GPU.
        say: Told of losses.

    Raises:
        MissingExtraError: If Ray is not installed.
        ConfigError: If the cluster has fewer GPUs than they take.
    """

    def __init__(self, spec: ModelSpec, count: int, on_gpu: bool, say: Callable[[str], None]) -> None:
        self._ray, self._spec, self._num_gpus, self._say = import_ray(), spec, int(on_gpu), say
        self._owns_cluster = not self._ray.is_initialized()
        if self._owns_cluster:
            os.environ.setdefault("RAY_worker_niceness", "0")  # the learner waits for them: they are no background work
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
            self._ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        num_gpus = self._ray.cluster_resources().get("GPU", 0)
        if on_gpu and num_gpus < count:
            raise ConfigError(
                f"ray={count} is not allowed: each takes a GPU, and the cluster has {num_gpus:.0f}",
                hint="ask for as many, or train with --device cpu",
            )
        self._waiting: deque[_Work] = deque()
        self._running: dict[Any, tuple[_Work, Any]] = {}  # Ray's reference -> work, actor
        self._actors = [self._start() for _ in range(count)]
        self._idle = list(self._actors)

    def _start(self) -> Any:
        # no CPU is booked: one that waits for a free one would wait for ever, without a word
        actor = self._ray.remote(num_cpus=0, num_gpus=self._num_gpus)(_WriterActor)
        return actor.remote(self._spec, torch.get_num_threads())

    @property
    @override
    def width(self) -> int:
        return len(self._actors)

    @override
    def submit(self, part: Part, on_reply: OnReply) -> Promise:
        if part.head is not None:
            part = replace(part, head=copy.deepcopy(part.head).cpu())  # the learner goes on changing it
        work = _Work(part, on_reply)
        self._waiting.append(work)
        self._assign()
        return partial(self._collect, work)

    def _assign(self) -> None:
        while self._idle and self._waiting:
            actor, work = self._idle.pop(), self._waiting.popleft()
            self._running[actor.write.remote(work.part)] = work, actor

    def _collect(self, work: _Work) -> list[Reply]:
        while work.replies is None:
            (ready,), _ = self._ray.wait(list(self._running), num_returns=1)
            self._receive(ready)
            self._assign()
        return work.replies

    def _receive(self, reference: Any) -> None:
        work, actor = self._running.pop(reference)
        try:
            work.replies = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            work.losses += 1
            if work.losses >= MAX_LOSSES:
                raise EngineClosedError(
                    f"{MAX_LOSSES} actors in a row were lost while writing the same replies: {first_line(error)}",
                    hint="see Ray's logs; an actor may lack memory",
                ) from None
            self._say("  [yellow]an actor was lost; another writes its replies[/]")
            self._actors.remove(actor)
            self._actors.append(actor := self._start())
            self._waiting.appendleft(work)
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, MaraError) else error) from None
        else:
            work.on_reply(len(work.replies))
        self._idle.append(actor)

    @override
    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        if self._owns_cluster:
            self._ray.shutdown()
