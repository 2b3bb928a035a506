"""The rewards that a head's config records, built again to judge the head, as far as that is safe.

A head may come from anyone. Rewards that are data are built; those that name code or a model to load are not, unless
the user says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mara_integrations.errors import MaraError
from mara_integrations.heads.config import REWARD_MODEL
from mara_integrations.models.load import LoadedModel
from mara_integrations.rewards import Reward, reward_from_spec
from mara_integrations.training.scoring.reward_files import kept_reward

# Rewards by name that load nothing; `toxicity` fetches a model.
_HARMLESS = (
    *("length", "regex", "forbidden-words", "json", "sentiment", "reading-level", "language", "ifeval"),
    *("answered", "admitted"),
)
_MAX_PATTERN = 1000
_TRUST_FLAG = "--trust-head-code"


def recorded_rewards(
    specs: Iterable[Mapping[str, Any]], folders: Sequence[Path], model: LoadedModel, *, trust_code: bool = False
) -> tuple[list[Reward], list[str]]:
    """Build the rewards that heads record.

    Args:
        specs: The descriptions in the heads' configs.
        folders: The heads' folders.
        model: The base model.
        trust_code: Import the functions and load the models that the descriptions name.

    Returns:
        The rewards, and a sentence about each one that is left out.
    """
    rewards: list[Reward] = []
    left_out = []
    for spec in specs:
        if not trust_code and (needs := _needs_trust(spec)):
            left_out.append(
                f"the head records a reward that {needs}; it is left out: name it by --reward, or trust this head "
                f"with {_TRUST_FLAG}"
            )
            continue
        try:
            if spec.get("kind") == REWARD_MODEL:
                rewards.append(kept_reward(spec, folders, model))
            else:
                rewards.append(reward_from_spec(spec))
        except MaraError as error:
            left_out.append(f"a reward that the head records is left out: {error.message}")
        except Exception as error:  # a description by hand may hold anything
            left_out.append(f"a reward that the head records is left out: {type(error).__name__} in its description")
    return rewards, left_out


def _needs_trust(spec: Any) -> str | None:
    """What a reward would do that only a trusted head may ask for; None if it is harmless."""
    kind = spec.get("kind") if isinstance(spec, Mapping) else None
    match kind:
        case "forbidden_words" | "reward_model":
            return None
        case "rules" | "required":  # patterns have a time limit
            return None if len(str(spec)) <= 10 * _MAX_PATTERN else "has very long rules"
        case "ready":
            name, arguments = spec.get("name"), spec.get("arguments")
            if name in _HARMLESS and len(str(arguments)) <= _MAX_PATTERN:
                return None
            return f"is {name!r} by name, which may load a model"
        case "combined":
            parts = spec.get("parts")
            parts = [part.get("reward") if isinstance(part, Mapping) else None for part in parts or ()]
            return next(filter(None, map(_needs_trust, parts)), None)
        case "function":
            return f"imports code ({spec.get('path')!r})"
        case "llm":
            return f"asks a chat model, which may cost money ({spec.get('name')!r})"
        case "model":
            return f"loads a model ({spec.get('source')!r})"
    return f"is of the kind {kind!r}"
