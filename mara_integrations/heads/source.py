"""Resolve what `head=` names (a head, a folder, a Hub id, several with weights) to a head on the model's device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from mara_integrations.errors import ConfigError
from mara_integrations.heads.cache import HeadCache
from mara_integrations.heads.compose import ComposedHead, Head
from mara_integrations.heads.head import MARAHead

OneHead: TypeAlias = MARAHead | str | Path
HeadSource: TypeAlias = OneHead | Sequence[OneHead] | Mapping[Any, float]  # keys: OneHead; Mapping is invariant


heads = HeadCache()  # of the process: engines, models and frameworks share it


def head_weights(source: HeadSource | None) -> dict[OneHead, float]:
    """Each head that is named, and its weight.

    Raises:
        ConfigError: If it names anything but heads, or is empty.
    """
    if source is None:
        return {}
    if isinstance(source, OneHead):
        return {source: 1.0}
    named = list(source) if isinstance(source, Sequence | Mapping) else []
    if not named or not all(isinstance(one, OneHead) for one in named):
        raise ConfigError(
            f"head={source!r} is not allowed",
            hint="a MARAHead, a path, or a Hub id; a list of these, or a mapping of these to weights",
        )
    weights = dict(source) if isinstance(source, Mapping) else {one: float(named.count(one)) for one in named}
    for one, weight in weights.items():
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ConfigError(f"head {str(one)!r} has the weight {weight!r}", hint="weights are numbers from 0 up")
    return weights


def place_heads(
    source: HeadSource | None,
    device: torch.device,
    hidden_size: int,
    model_name: str,
    fingerprint: str | None = None,
) -> Head | None:
    """Return the head that is named, ready to judge a model's states; None if none is, or all weights are 0.

    Args:
        source: What the user named.
        device: Device of the model's states.
        hidden_size: Width of the states.
        model_name: Name of the model.
        fingerprint: Fingerprint of the model; None where unknown.

    Raises:
        ConfigError: See `head_weights` and `ComposedHead`.
        HeadError: If a head can't be read, or does not fit the model.
    """
    placed: dict[MARAHead, float] = {}
    for one, weight in head_weights(source).items():
        if isinstance(one, MARAHead):
            head, name = one.to(device).eval(), None
        else:
            head, name = heads.get(one, device), one
        head.check_fits(hidden_size, model_name, name, fingerprint=fingerprint)
        if weight > 0:
            placed[head] = placed.get(head, 0.0) + weight
    if not placed:
        return None
    head, weight = next(iter(placed.items()))
    return head if weight == 1 and len(placed) == 1 else ComposedHead(placed)


def base_model_of(source: HeadSource) -> str:
    """Return the name of the model that heads were trained on, as they record it.

    Raises:
        ConfigError: If a head records none, or heads record different ones.
        HeadError: If a head can't be read.
    """
    names: dict[str, str] = {}
    for one in head_weights(source):
        head = one if isinstance(one, MARAHead) else heads.get(one)
        if head.config.base_model is None:
            name = "the head" if isinstance(one, MARAHead) else f"head {str(one)!r}"
            raise ConfigError(f"{name} does not record the model it was trained on", hint="name it, as model=...")
        names[head.config.base_model] = str(one)
    if len(names) > 1:
        raise ConfigError(
            f"the heads were trained on different models: {', '.join(map(repr, names))}", hint="name one, as model=..."
        )
    return next(iter(names))


def head_name(source: HeadSource | None) -> str | None:
    """Return the names of the heads that are named, without loading them."""
    names = []
    for one, weight in head_weights(source).items():
        name = f"{one.config.form} head of {one.config.base_model}" if isinstance(one, MARAHead) else str(one)
        names.append(name if weight == 1 else f"{weight:g} x {name}")
    return " + ".join(names) or None


def head_fingerprint(source: HeadSource | None) -> str | None:
    """Return a text that differs for heads that can answer differently, without loading a model.

    Raises:
        HeadError: If a head can't be read.
    """
    parts = []
    for one, weight in head_weights(source).items():
        head = one if isinstance(one, MARAHead) else heads.get(one)
        trained = head.config.model_dump_json(include={"scale", "top_k", "top_p", "min_candidates", "system_prompt"})
        parts.append(f"{weight} x {head.fingerprint} {trained}")
    return " + ".join(parts) or None
