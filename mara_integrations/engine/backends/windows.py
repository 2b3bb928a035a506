"""Attention that ends a window's length back: narrowed for a probe, so that a handful of tokens crosses it.

Most models hand their window to the attention function, where ours heeds it. Some, as Llama 4 with its chunks, know it
only in the mask they build, which a packed forward does not read: on a short prompt both look alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

_NAMES = ("sliding_window", "attention_chunk_size")


def has_windows(model: PreTrainedModel) -> bool:
    """Return whether some of a model's layers do not attend to all earlier tokens."""
    return any(_is_set(model.config.get_text_config(), name) for name in _NAMES)


@contextmanager
def narrowed(model: PreTrainedModel, width: int = 3) -> Iterator[None]:
    """A model whose windows are `width` tokens wide, in its configuration and in its layers, until the block ends."""
    holders = [model.config, model.config.get_text_config(), *model.modules()]
    places = {(id(holder), name): (holder, name) for holder in holders for name in _NAMES if _is_set(holder, name)}
    found = [(holder, name, getattr(holder, name)) for holder, name in places.values()]
    try:
        for holder, name, _ in found:
            setattr(holder, name, width)
        yield
    finally:
        for holder, name, value in found:
            setattr(holder, name, value)


def _is_set(holder: Any, name: str) -> bool:
    return isinstance(getattr(holder, name, None), int)
