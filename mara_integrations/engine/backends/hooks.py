"""Read hidden states from a model without leaving hooks on it.

Transformers puts a hook on every layer when hidden states are first asked for and leaves it there: the model no longer
pickles, and every later forward calls them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# Attribute that transformers sets on a model which has its hooks.
_MARK = "_output_capturing_hooks_installed"


@contextmanager
def hooks_undone(model: nn.Module) -> Iterator[None]:
    """On exit, remove the forward hooks that were added inside the block; earlier ones stay."""
    before = {module: (set(module._forward_hooks), hasattr(module, _MARK)) for module in model.modules()}
    try:
        yield
    finally:
        for module, (known, was_marked) in before.items():
            for handle in module._forward_hooks.keys() - known:
                del module._forward_hooks[handle]
            if not was_marked and hasattr(module, _MARK):
                delattr(module, _MARK)
