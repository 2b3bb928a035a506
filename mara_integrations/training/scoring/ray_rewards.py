"""A reward in a process of its own on Ray, beside the rollout workers; a process that is lost is replaced.

This module imports no torch, so that such a process starts without it unless its reward needs it.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from mara_integrations.errors import EngineClosedError
from mara_integrations.rewards import (
    CombinedReward,
    JudgeReward,
    Reward,
    reward_from_spec,
    reward_name,
    reward_spec,
    takes_partial_text,
)
from mara_integrations.training.rollouts.ray_cluster import MAX_LOSSES, first_line, import_ray


class _Actor:
    """One reward in a process of its own."""

    def __init__(self, reward: Mapping[str, Any] | Callable[..., Any], folder: str) -> None:
        with suppress(OSError):  # another machine may not have it; a function's path may be relative to it
            os.chdir(folder)
        self._reward = reward if callable(reward) else reward_from_spec(reward)

    def score(self, arguments: Mapping[str, Any]) -> Any:
        result = self._reward(**arguments)
        return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


class RayReward:
    """A reward that runs in an actor and is called like the reward itself.

    Args:
        reward: The reward. One that has a description is rebuilt from it in the actor; a plain function is pickled.

    Attributes:
        actor: Ray's handle of the actor.
    """

    def __init__(self, reward: Reward) -> None:
        self._ray, self._spec = import_ray(), reward_spec(reward)
        self._source = self._spec if hasattr(reward, "spec") else reward
        self.__name__ = reward_name(reward)
        self.takes_partial_text = takes_partial_text(reward)
        self.__signature__ = inspect.signature(reward)
        self.actor = self._start()

    def _start(self) -> Any:
        return self._ray.remote(num_cpus=0)(_Actor).remote(self._source, os.getcwd())

    def spec(self) -> dict[str, Any]:
        """Return the description of the reward itself."""
        return self._spec

    def __call__(self, **arguments: Any) -> Any:
        """Return what the reward returns."""
        for _ in range(MAX_LOSSES):
            try:
                return self._ray.get(self.actor.score.remote(arguments))
            except self._ray.exceptions.RayActorError as error:
                lost = error
                self.actor = self._start()
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
        raise EngineClosedError(f"the reward's actor was lost {MAX_LOSSES} times: {first_line(lost)}")


def on_ray(reward: Reward) -> Reward:
    """Return a reward that runs in an actor; of a combined reward, each part runs in its own.

    A judge stays here, where its answers and its budget are: it waits for others most of the time.
    """
    if isinstance(reward, JudgeReward):
        return reward
    return reward.replaced(on_ray) if isinstance(reward, CombinedReward) else RayReward(reward)
