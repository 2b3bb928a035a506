"""Settings of vLLM, as `model_kwargs` gives them. Torch-free, and vLLM is not imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mara_integrations.errors import ConfigError

# Arguments of vLLM that are told in another way, and how; or that heads can't run with.
_ELSEWHERE = {
    "model": "give it as model=",
    "tokenizer": "the model's own is read",
    "dtype": "give it as dtype=",
    "revision": "give it as revision=",
    "seed": "give seed= to a request",
    "logits_processors": "heads are given as head=",
    "logprobs_mode": "log-probabilities are those of the base model",
    "speculative_config": "heads can't run with speculative decoding",
}


def check_for_vllm(model: Any, quantization: str | None, model_kwargs: Mapping[str, Any]) -> None:
    """Refuse settings that vLLM does not support here, before anything is looked up; arguments as in `ModelSpec`.

    Raises:
        ConfigError: Names the setting, and what to use instead.
    """
    if not isinstance(model, str | os.PathLike):
        raise ConfigError(
            "engine='vllm' loads models itself, and this model is loaded already",
            hint="give its folder or Hub id, or leave engine out",
        )
    if quantization is not None:
        raise ConfigError(
            f"quantization={quantization!r} is not for engine='vllm'",
            hint="vLLM's own are given as model_kwargs={'quantization': ...}",
        )
    for name, hint in _ELSEWHERE.items():
        if name in model_kwargs:
            value = model_kwargs[name]
            raise ConfigError(f"model_kwargs has {name}={value!r}, which is not for engine='vllm'", hint=hint)
