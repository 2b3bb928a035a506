"""What a request says of its heads, in `extra_args` or `vllm_xargs`, checked and looked up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mara_integrations.engine.settings import resolve_settings, unknown_setting
from mara_integrations.errors import ConfigError, HeadError
from mara_integrations.heads.compose import Head, afterstate_parts
from mara_integrations.heads.source import HeadSource, heads, place_heads
from mara_integrations.vllm.served import head_folder, heads_folder
from mara_integrations.vllm.tables import GatedRequest

_GROUP, _PREFIX = "mara", "mara_"
_SETTINGS = ("head", "weights", "strength", "top_k", "top_p", "min_candidates")
_GREEDY = 1e-5  # vLLM takes temperatures below as greedy


def settings_of(extra_args: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what a request says of its heads; None where it says nothing.

    Args:
        extra_args: `{"mara": {"head": ..., "strength": ...}}`, or flat `{"mara_head": ..., "mara_strength": ...}`, as
            values of `vllm_xargs` can't be objects; what does not begin so belongs to others.

    Raises:
        ConfigError: If a setting is unknown, or both forms are used.
    """
    given = extra_args or {}
    flat = {name.removeprefix(_PREFIX): value for name, value in given.items() if name.startswith(_PREFIX)}
    group = given.get(_GROUP)
    if group is None and not flat:
        return None
    if group is not None and (flat or not isinstance(group, Mapping)):
        raise ConfigError(
            f"mara={group!r} is not allowed" + (f" beside mara_{next(iter(flat))}" if flat else ""),
            hint='an object as {"head": "brand-voice", "strength": 0.8}, or flat names as mara_head and mara_strength',
        )
    settings = dict(group) if group is not None else flat
    for name, value in settings.items():
        if name not in _SETTINGS:
            raise unknown_setting(str(name), value, _SETTINGS, " of a head")
    return settings


def gated_request(
    extra_args: Mapping[str, Any] | None, temperature: float, device: torch.device, models: Mapping[int, str]
) -> GatedRequest | None:
    """Return how a request is gated; None where it is not, or at strength 0.

    Args:
        extra_args: See `settings_of`.
        temperature: Temperature of the request.
        device: Where its heads are needed.
        models: Names of the models that may be meant, by hidden size; empty where unknown.

    Raises:
        ConfigError: If a setting is unknown or out of bounds, or a head is not served or can't run in vLLM.
        HeadError: If a head can't be read, or does not fit the model.
    """
    settings = settings_of(extra_args)
    if settings is None:
        return None
    folder = heads_folder()
    source = _source(settings.pop("head", None), settings.pop("weights", None))
    temperature = temperature if temperature >= _GREEDY else 0.0
    call = {**settings, "head": source, "temperature": temperature, "system_prompt": ""}

    def place(_: HeadSource | None) -> Head | None:
        return _placed({head_folder(name, folder): weight for name, weight in source.items()}, device, models)

    try:
        resolved = resolve_settings(call, {}, place)
    except (ConfigError, HeadError) as error:  # a client must not read where heads lie
        raise type(error)(error.message.replace(f"{folder}/", ""), hint=error.hint) from None
    if resolved.head is None or resolved.gate.strength == 0:
        return None
    sampling = resolved.sampling
    return GatedRequest(
        resolved.head,
        resolved.gate.strength,
        sampling.top_k,
        sampling.top_p,
        sampling.min_candidates,
        sampling.temperature or 1.0,
    )


def _source(head: Any, weights: Any) -> dict[str, float]:
    """Weights by name, of one name, several, or a mapping."""
    if isinstance(head, Mapping) and weights is None:
        named = dict(head)
    else:
        names = [head] if isinstance(head, str) else list(head) if isinstance(head, Sequence) else []
        given = [1.0] * len(names) if weights is None else weights
        given = [given] if isinstance(given, int | float) else given
        if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != len(names):
            raise ConfigError(f"weights={weights!r} is not allowed", hint="a number for each head")
        named = dict(zip(names, given, strict=True)) if all(isinstance(name, str) for name in names) else {}
        if len(named) != len(names):
            named = {}  # something else than names, or one twice
    if not named or not all(isinstance(name, str) for name in named):
        raise ConfigError(f"head={head!r} is not allowed", hint="the name of a head, or a list of different names")
    return named


def _placed(source: dict[Any, float], device: torch.device, models: Mapping[int, str]) -> Head | None:
    widths = [heads.get(path, device).config.hidden_size for path in source]
    fits = not models or widths[0] in models
    width = widths[0] if fits else min(models)
    placed = place_heads(source, device, width, models.get(width, "served here"))
    if placed is not None and (others := afterstate_parts(placed)):
        form = next(iter(others)).config.form
        raise ConfigError(
            f"a head of the {form!r} form can't run in vLLM: it has every candidate fed",
            hint="train a head of the 'q' form, or run this one in `mara-tools serve`",
        )
    return placed
