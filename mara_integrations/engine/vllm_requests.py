"""Requests as vLLM takes them, and what it can't do. Knows vLLM's names, and does not import it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from mara_integrations.engine.limits import EngineLimits
from mara_integrations.engine.request import Constraint, Request
from mara_integrations.errors import ConfigError
from mara_integrations.files import make_folder_once
from mara_integrations.heads.compose import Head, afterstate_parts
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.source import HeadSource, head_weights, heads

_TELLS = "engine='transformers', which runs every head and tells what the gate does"
_INSTEAD = {
    "never": "run it with engine='transformers', which keeps words out",
    "trace": f"run it with {_TELLS}; log-probabilities are told here, too",
    "selection": "leave it out: greedy at temperature 0, and sample above",
    "fallback": "leave it out: it is for heads that judge one candidate after another",
}
_MAX_TEMPERATURE = 2.0  # Source: vLLM 0.32, `SamplingParams`
_LIMITS = {
    "prefill_chunk": "max_num_batched_tokens",
    "kv_bytes": "kv_cache_memory_bytes",
    "prefix_cache_bytes": "enable_prefix_caching",
}


class EngineGrammar(Constraint):
    """A grammar that the engine itself applies, as a structural tag of xgrammar.

    Args:
        structural_tag: Plain JSON.
    """

    def __init__(self, structural_tag: Mapping[str, Any]) -> None:
        self.structural_tag = json.dumps(structural_tag)

    def mask(self, logits: Tensor) -> None:
        """Never called: the engine has masked them."""
        raise AssertionError("the engine applies the grammar")

    def accept(self, token_id: int) -> None:
        """Do nothing: the engine follows the reply itself."""
        return None


def check_vllm_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of a request that vLLM can't follow.

    Raises:
        ConfigError: Names the setting, and what to use instead.
    """
    for name, hint in _INSTEAD.items():
        value = settings.get(name)
        if value not in (None, False, (), [], "auto") and (name, value) != ("fallback", "first"):
            raise ConfigError(f"{name}={value!r} can't be done by engine='vllm'", hint=hint)
    temperature = settings.get("temperature")
    if isinstance(temperature, int | float) and temperature > _MAX_TEMPERATURE:
        raise ConfigError(
            f"temperature={temperature!r} can't be done by engine='vllm'",
            hint=f"vLLM samples at {_MAX_TEMPERATURE} at most",
        )
    if settings.get("strength") != 0:
        check_vllm_heads(settings.get("head"))


def check_vllm_heads(source: HeadSource | None) -> None:
    """Refuse heads that need every candidate fed; reads them, and no model.

    Raises:
        ConfigError: Names the form.
        HeadError: If a head can't be read.
    """
    for one in head_weights(source):
        form = (one if isinstance(one, MARAHead) else heads.get(one)).config.form
        if form != "q":
            raise ConfigError(
                f"a head of the {form!r} form can't run with engine='vllm': it has every candidate fed",
                hint="train a head of the 'q' form, or run this one with engine='transformers'",
            )


def check_vllm_limits(limits: EngineLimits | None) -> None:
    """Refuse limits that vLLM sets itself.

    Raises:
        ConfigError: Names the limit, and vLLM's own.
    """
    for name, theirs in _LIMITS.items():
        value = getattr(limits, name, None)
        if limits is not None and value != EngineLimits.model_fields[name].default:
            raise ConfigError(
                f"{name}={value!r} is not for engine='vllm'", hint=f"give model_kwargs={{{theirs!r}: ...}}, vLLM's own"
            )


def check_vllm_request(request: Request) -> None:
    """Refuse a request that vLLM can't decode as it is.

    Raises:
        ConfigError: Names what is in the way.
    """
    if not len(request.prompt_ids):
        raise ConfigError("the prompt is empty", hint="give it at least one token")
    temperature = request.sampling.temperature
    check_vllm_settings({"trace": request.gate.trace, "selection": request.gate.selection, "temperature": temperature})
    if request.feeds_candidates:
        assert request.head is not None
        form = next(iter(afterstate_parts(request.head))).config.form
        raise ConfigError(f"a head of the {form!r} form can't run with engine='vllm'", hint=f"use {_TELLS}")
    if request.constraint is not None and not isinstance(request.constraint, EngineGrammar):
        raise ConfigError("a constraint in Python can't run with engine='vllm'", hint="use engine='transformers'")
    if request.keep_states or request.keep_positions:
        raise ConfigError("engine='vllm' keeps no hidden states", hint="train with engine='transformers'")
    if not _is_gated(request) and request.sampling.temperature > 0 and request.sampling.min_candidates > 1:
        raise ConfigError(
            f"min_candidates={request.sampling.min_candidates} needs a head with engine='vllm'", hint="leave it out"
        )


def vllm_params(request: Request, heads_folder: Path) -> dict[str, Any]:
    """Return the arguments of vLLM's `SamplingParams`; `structured_outputs` are given as a structural tag.

    Args:
        request: A request that `check_vllm_request` lets through.
        heads_folder: Where vLLM finds heads; those of the request are saved there.
    """
    sampling = request.sampling
    params: dict[str, Any] = {
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_new_tokens,
        "seed": sampling.seed,
        "stop_token_ids": sorted(request.eos_token_ids),
        "ignore_eos": True,  # it has its own idea of what ends a reply
        "logprobs": request.top_logprobs or 0,  # of the token taken in any case
        "detokenize": False,  # the text is followed here, with stop strings
    }
    candidates = {"top_k": sampling.top_k, "top_p": sampling.top_p}
    if _is_gated(request):
        assert request.head is not None
        of_head = {"head": saved_heads(request.head, heads_folder), "strength": request.gate.strength}
        params["extra_args"] = {"mara": {**of_head, **candidates, "min_candidates": sampling.min_candidates}}
    elif sampling.temperature > 0:
        params |= candidates
    if isinstance(request.constraint, EngineGrammar):
        params["structural_tag"] = request.constraint.structural_tag
    return params


def saved_heads(head: Head, folder: Path) -> dict[str, float]:
    """Save a head, or the parts of a composed one, unless that is done; return their names and weights."""
    weights = {}
    for part, factor in head.parts.items():
        scale = part.config.scale
        name = sha256(f"{part.fingerprint} {scale!r}".encode()).hexdigest()[:32]
        if not (folder / name).is_dir():
            make_folder_once(folder / name, functools.partial(_save, part))
        weights[name] = factor / scale if scale else 1.0
    return weights


def _save(head: MARAHead, folder: Path) -> None:
    head.save_pretrained(folder)


def _is_gated(request: Request) -> bool:
    return request.head is not None and request.gate.strength > 0
