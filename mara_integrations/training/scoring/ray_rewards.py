"""A reward in a process of its own on Ray, beside the models that write; one that is lost is replaced.

Knows no model, so that such a process starts without torch unless its reward needs it.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from typing import Any

from mara_integrations.errors import EngineClosedError, MissingExtraError
from mara_integrations.rewards import (
    CombinedReward,
    Reward,
    reward_from_spec,
    reward_name,
    reward_spec,
    takes_partial_text,
)

MAX_LOSSES = 3  # of actors on one piece of work: what kills one each time will kill the next


def import_ray() -> Any:
    """The library.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtraError(
            "--ray needs ray, which is not installed", hint="pip install mara-integrations[ray]"
        ) from None
    return ray


class _RewardActor:
    """One reward in a process of its own."""

    def __init__(self, spec: Mapping[str, Any], folder: str) -> None:
        with suppress(OSError):  # another machine may not have it; a function's path may be relative to it
            os.chdir(folder)
        self._reward = reward_from_spec(spec)

    def judge(self, arguments: Mapping[str, Any]) -> Any:
        result = self._reward(**arguments)
        return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


class RayReward:
    """A reward that runs in an actor; called like the reward itself.

    Args:
        reward: Rebuilt in the actor from its `spec`.
    """

    def __init__(self, reward: Reward) -> None:
        self._ray, self._spec = import_ray(), reward_spec(reward)
        self.__name__ = reward_name(reward)
        self.takes_partial_text = takes_partial_text(reward)
        self.__signature__ = inspect.signature(reward)
        self._actor = self._start()

    def _start(self) -> Any:
        return self._ray.remote(num_cpus=0)(_RewardActor).remote(self._spec, os.getcwd())

    def spec(self) -> dict[str, Any]:
        """That of the reward itself."""
        return self._spec

    def __call__(self, **arguments: Any) -> Any:
        """What the reward says."""
        for _ in range(MAX_LOSSES):
            try:
                return self._ray.get(self._actor.judge.remote(arguments))
            except self._ray.exceptions.RayActorError as error:
                lost = error
                self._actor = self._start()
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
        raise EngineClosedError(f"the reward's actor was lost {MAX_LOSSES} times: {first_line(lost)}")


def on_ray(reward: Reward) -> Reward:
    """A reward in an actor; of a combined one each part in one of its own."""
    return reward.replaced(RayReward) if isinstance(reward, CombinedReward) else RayReward(reward)


def first_line(error: BaseException) -> str:
    """Of an error's message; Ray's go on for pages."""
    return str(error).strip().split("\n")[0]
