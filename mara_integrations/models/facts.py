"""What a model of transformers says of itself: where it is, how wide it is, how much it reads, and how replies end."""

from __future__ import annotations

from typing import Any

import torch

_UNBOUNDED_CONTEXT = 32_768  # promised for models without a maximal length (ALiBi, state spaces)


def device_of(model: Any) -> torch.device:
    """Return the device of the first layer; a device map may put other layers elsewhere."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def vocab_size_of(model: Any) -> int:
    """Return the width of the logits."""
    output = model.get_output_embeddings()  # its weight may be packed, and of another shape
    return int(output.out_features if hasattr(output, "out_features") else model.get_input_embeddings().weight.shape[0])


def context_window_of(config: Any, tokenizer: Any) -> int:
    """Return the most tokens of prompt and reply together."""
    window = getattr(config, "max_position_embeddings", None)  # n_positions and the like are mapped to it
    if window is None:
        window = getattr(tokenizer, "model_max_length", None)
    return int(window) if window is not None and window < 10**9 else _UNBOUNDED_CONTEXT  # 10**30 means no limit


def eos_token_ids_of(generation: Any, config: Any, tokenizer: Any) -> frozenset[int]:
    """Return the end tokens of the first source that names any: where sources differ, `generate` follows the first."""
    for holder in (generation, config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids) if isinstance(ids, list | tuple) else frozenset([int(ids)])
    return frozenset()
