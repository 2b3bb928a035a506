"""Builds rewards from the notation of a command line or the description in a head's config, and describes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias
from urllib.parse import unquote

from mara_integrations.errors import RewardError
from mara_integrations.rewards.classifier import ModelReward
from mara_integrations.rewards.combined import CombinedReward
from mara_integrations.rewards.functions import load_reward
from mara_integrations.rewards.judges import JudgeReward
from mara_integrations.rewards.protocol import Reward
from mara_integrations.rewards.ready import READY, ready_reward
from mara_integrations.rewards.rules import Required, parse_rule
from mara_integrations.rewards.words import ForbiddenWords

MODEL_PREFIX = "hf:"
JUDGE_PREFIX = "llm:"


def parse_reward(text: str) -> tuple[Reward, float]:
    """Return a reward and its weight from the notation of a command line.

    Args:
        text: `module:function` or `file.py:function`; a name of `READY`; `hf:` with a Hub id or folder; or `llm:` with
            a chat model that judges, `llm:openai:gpt-5-mini?rubric=rubric.md`. Arguments follow as in an
            address, `length?words=60`, and a weight as `=0.5` or, behind arguments, as `&weight=0.5`.

    Raises:
        RewardError: If there is no such reward, or an argument is wrong.
        ConfigError: If an argument has a value that is not allowed.
        MissingExtraError: If a package that it needs is not installed.
    """
    place, has_arguments, query = text.partition("?")
    arguments: dict[str, str] = {}
    for item in query.split("&") if has_arguments else ():
        name, _, value = item.partition("=")
        arguments[name] = unquote(value)
    weight = arguments.pop("weight", None)
    if not has_arguments and "=" in place:
        place, _, weight = place.rpartition("=")
    try:
        factor = 1.0 if weight is None else float(weight)
    except ValueError:
        raise RewardError(
            f"reward {text!r}: weight {weight!r} is not a number", hint="for example sentiment=0.5"
        ) from None
    if place.startswith(MODEL_PREFIX):
        return ModelReward.of(place.removeprefix(MODEL_PREFIX), arguments), factor
    if place.startswith(JUDGE_PREFIX):
        return JudgeReward.of(place.removeprefix(JUDGE_PREFIX), arguments), factor
    if place in READY or (":" not in place and not place.endswith(".py")):
        return ready_reward(place, arguments), factor
    if arguments:
        raise RewardError(f"reward {text!r}: a function of yours takes no arguments here")
    return load_reward(place), factor


def load_rewards(texts: Sequence[str], *, normalise: bool = False) -> Reward:
    """Return the reward that a command line names, or the weighted sum of several; see `parse_reward`."""
    return combine_rewards([parse_reward(text) for text in texts], normalise=normalise)


RewardLike: TypeAlias = "Reward | str | tuple[Reward | str, float]"  # a function or its notation, and a weight


def weighted_rewards(given: RewardLike | Sequence[RewardLike]) -> list[tuple[Reward, float]]:
    """Return rewards with their weights from what Python code may give: one or several functions, or their notations.

    Raises:
        RewardError: If one is neither a function nor the notation of one; see `parse_reward`.
    """
    several = [given] if (isinstance(given, str | tuple) and given) or callable(given) else list(given)
    weighted: list[tuple[Reward, float]] = []
    for each in several:
        reward, weight = each if isinstance(each, tuple) else (each, 1.0)
        if isinstance(reward, str):
            reward, own = parse_reward(reward)
            weight *= own
        if not callable(reward):
            raise RewardError(
                f"reward {reward!r} is a {type(reward).__name__}",
                hint="give a function, or a notation such as 'length'",
            )
        weighted.append((reward, float(weight)))
    return weighted


def combine_rewards(weighted: Sequence[tuple[Reward, float]], *, normalise: bool = False) -> Reward:
    """Return one reward: a single one of weight 1 as it is, else the weighted sum of all."""
    if len(weighted) == 1 and weighted[0][1] == 1.0 and not normalise:
        return weighted[0][0]
    return CombinedReward(weighted, normalise=normalise)


def reward_spec(reward: Reward) -> dict[str, Any]:
    """Return a reward's own `spec()`, or the dotted path of a plain function, for `head_config.json`."""
    if isinstance(reward, CombinedReward):
        return reward.spec(reward_spec)
    if hasattr(reward, "spec"):
        spec: dict[str, Any] = reward.spec()
        return spec
    owner = reward if hasattr(reward, "__qualname__") else type(reward)
    return {"kind": "function", "path": f"{owner.__module__}:{owner.__qualname__}"}


def reward_from_spec(spec: Mapping[str, Any]) -> Reward:
    """Build the reward that `reward_spec` described.

    Raises:
        RewardError: If the description is of no known kind or lacks a field.
        MaraError: If the reward that it describes can't be built.
    """
    try:
        match spec["kind"]:
            case "forbidden_words":
                return ForbiddenWords(spec["words"])
            case "rules":
                return parse_rule(spec["rules"])
            case "required":
                return Required(spec["what"])
            case "function":
                return load_reward(spec["path"])
            case "ready":
                return ready_reward(spec["name"], spec["arguments"])
            case "model":
                return ModelReward.of(spec["source"], spec["arguments"])
            case "llm":
                return JudgeReward.from_spec(spec)
            case "combined":
                weighted = [(reward_from_spec(part["reward"]), part["weight"]) for part in spec["parts"]]
                return CombinedReward(weighted, normalise=spec["normalise"])
    except KeyError as error:
        raise RewardError(f"reward description {dict(spec)!r} lacks {error}") from None
    raise RewardError(
        f"reward kind {spec['kind']!r} is unknown",
        hint="kinds are forbidden_words, rules, required, function, ready, model, llm, combined",
    )
