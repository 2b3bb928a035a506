"""Calls a reward on a batch with the arguments that it takes and a time limit, and checks the result.

A mistake in a reward becomes one clear message, and the arguments of the failed call are written to a file.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from mara_integrations.errors import CallBudgetError, OutputError, RewardError
from mara_integrations.files import write_atomically
from mara_integrations.messages import Message
from mara_integrations.rewards.protocol import Reward, reward_name, short

Scores: TypeAlias = list[float | None]


@runtime_checkable
class Composed(Protocol):
    """A reward made of others, which are called one by one."""

    @property
    def parts(self) -> Mapping[str, Reward]:
        """Return the others by name."""

    def combine(self, parts: Mapping[str, Scores]) -> Scores:
        """Return one score a reply from the scores of the parts."""


def score(
    reward: Reward,
    prompts: Sequence[Sequence[Message]],
    completions: Sequence[str],
    *,
    completion_ids: Sequence[Sequence[int]] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    conversational: bool = False,
    timeout_s: float | None = None,
    failure_file: str | Path | None = None,
    on_parts: Callable[[Mapping[str, Scores]], None] | None = None,
) -> Scores:
    """Score a batch with one call, and check the result.

    Args:
        reward: The reward.
        prompts: One conversation a reply.
        completions: Texts of the replies.
        completion_ids: Token ids of the replies, for functions that take them.
        columns: Other fields of the prompts, one value a reply, for functions that take them.
        conversational: Pass prompts and completions as lists of messages; else as strings, and then each prompt must be
            one user message.
        timeout_s: Time limit of one call, in seconds; None is no limit. Judges have limits of their own.
        failure_file: File that the arguments are written to if the reward fails.
        on_parts: Called with the scores of each part of a composed reward, else with the reward's own, by name.

    Returns:
        One finite number a reply, or None where the reward has no opinion.

    Raises:
        RewardError: If the reward wants what the data lacks, raises, takes too long, or returns anything but one finite
            number or None a reply.
        CallBudgetError: If judges have made as many calls as they may.
    """
    if not completions:
        return []
    offered: dict[str, Any] = {
        **(columns or {}),
        "prompts": [_as_trl(prompt, conversational) for prompt in prompts],
        "completions": [_as_trl([Message("assistant", text)], conversational) for text in completions],
    }
    if completion_ids is not None:
        offered["completion_ids"] = [list(ids) for ids in completion_ids]
    try:
        if not isinstance(reward, Composed):
            scores = _ask(reward, reward_name(reward), offered, prompts, completions, timeout_s)
            parts: Mapping[str, Scores] = {reward_name(reward): scores}
        else:
            parts = {
                name: _ask(part, name, offered, prompts, completions, timeout_s) for name, part in reward.parts.items()
            }
            scores = reward.combine(parts)
    except RewardError as error:
        if failure_file is None:
            raise
        content = json.dumps(offered, ensure_ascii=False, indent=1, default=str) + "\n"
        write_atomically(failure_file, content.encode(errors="backslashreplace"), private=True)
        where = f"its inputs are in {failure_file}"
        raise RewardError(error.message, hint=f"{where}; {error.hint}" if error.hint else where) from error
    if on_parts is not None:
        on_parts(parts)
    return scores


def _ask(
    reward: Reward,
    name: str,
    offered: dict[str, Any],
    prompts: Sequence[Sequence[Message]],
    completions: Sequence[str],
    timeout_s: float | None,
) -> Scores:
    arguments = _accepted(reward, name, offered)
    timeout_s = None if getattr(reward, "limits_its_time", False) else timeout_s
    try:
        result = _called(lambda: reward(**arguments), timeout_s)
    except _TookTooLongError:
        raise RewardError(
            f"reward {name!r} did not answer within {timeout_s:g} s (batch of {len(completions)})",
            hint="make it faster, or give it more time",
        ) from None
    except (CallBudgetError, OutputError, RewardError):  # ours, and clear already
        raise
    except Exception as error:
        first = f"prompt {short(prompts[0][-1].content)}, reply {short(completions[0])}"
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise RewardError(
            f"reward {name!r} raised {type(error).__name__}: {error} (batch of {len(completions)}; first: {first})",
            hint=f"it happened at {frame.filename}:{frame.lineno}",
        ) from error
    return _checked(result, name, completions)


class _TookTooLongError(Exception):
    pass


def _called(call: Callable[[], Any], timeout_s: float | None) -> Any:
    """Return the result of a call, awaited if need be, within the time limit.

    A coroutine runs in a thread of its own, because this one may have an event loop, as in a notebook.
    """
    if timeout_s is None:
        result = call()
        return _in_thread(lambda: _settled(result), None) if inspect.isawaitable(result) else result
    return _in_thread(lambda: _settled(call()), timeout_s)


def _in_thread(call: Callable[[], Any], timeout_s: float | None) -> Any:
    """Return the result of a call in a thread. A call that takes too long is abandoned: nothing can stop it."""
    result: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:  # SystemExit, too, would end this thread without a word
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True, name="reward")  # a daemon's hanging does not keep the process
    thread.start()
    thread.join(timeout_s)
    if failure:
        raise failure[0]
    if thread.is_alive():
        raise _TookTooLongError
    return result[0]


def _settled(result: Any) -> Any:
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


def _as_trl(messages: Sequence[Message], conversational: bool) -> Any:
    if conversational:
        return [message.as_dict() for message in messages]
    assert len(messages) == 1, "a standard prompt is one message"
    return messages[0].content


def _accepted(reward: Reward, name: str, offered: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that the reward takes, of those offered."""
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # some callables of C have none
        return offered
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    wanted = [p.name for p in parameters if p.name in named and p.default is p.empty and p.name not in offered]
    if wanted:
        raise RewardError(
            f"reward {name!r} takes {', '.join(map(repr, wanted))}, which the data does not have",
            hint=f"it has {', '.join(offered)}",
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    return {key: value for key, value in offered.items() if key in named}


def _checked(result: Any, name: str, completions: Sequence[str]) -> Scores:
    # Arrays and tensors say what they hold by tolist(), whatever their library.
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"reward {name!r} returned {short(result)}, of type {type(result).__name__}",
            hint="a list of numbers is needed",
        )
    if len(values) != len(completions):
        raise RewardError(
            f"reward {name!r} returned a list of length {len(values)} for {len(completions)} completions",
            hint="it is called once a batch and must return one number, or None, a completion",
        )
    return [_number(value, index, name, completions[index]) for index, value in enumerate(values)]


def _number(value: Any, index: int, name: str, completion: str) -> float | None:
    value = value.item() if hasattr(value, "item") else value  # a scalar of numpy or torch
    if value is None:
        return None
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    raise RewardError(
        f"reward {name!r} returned {short(value)} at index {index}, for the reply {short(completion)}",
        hint="allowed are finite numbers, and None where the reward has no opinion",
    )
