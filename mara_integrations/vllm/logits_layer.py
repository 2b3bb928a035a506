"""vLLM's layer that makes logits, replaced by one that also remembers of what it made them.

vLLM calls such a class an out-of-tree pluggable layer. All its models make their logits in this layer, whatever their
architecture, and it is not compiled; so hidden states and output embeddings are seen here, and nothing is patched.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import PluggableLayer
from vllm.model_executor.layers import logits_processor

from mara_integrations.errors import ConfigError, ModelError
from mara_integrations.vllm.served import publish

_NAME = "LogitsProcessor"


class Seen(NamedTuple):
    """What the last logits were made of.

    Attributes:
        output_layer: The layer of the output embeddings.
        hidden: Hidden states, shape (B, d).
    """

    output_layer: Any
    hidden: Tensor


_last: Seen | None = None  # of this process, which runs one step of one model at a time


def take() -> Seen | None:
    """Return what the last logits were made of, and forget it; None where none were made since."""
    global _last
    seen, _last = _last, None
    return seen


class GatedLogitsLayer(logits_processor.LogitsProcessor):  # type: ignore[misc]  # vLLM is optional
    """`LogitsProcessor` of vLLM that remembers its input.

    Raises:
        ConfigError: If the server is set up in a way in which the gate would be wrong.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        _refuse(config)
        publish(config.model_config.get_hidden_size(), str(config.model_config.model))

    def forward(self, lm_head: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """Make logits of hidden states; see vLLM's class for the arguments."""
        global _last
        _last = Seen(lm_head, hidden_states)
        # not super(): with LoRA, vLLM calls this with a wrapper that is not an instance of this class
        logits: Tensor | None = logits_processor.LogitsProcessor.forward(self, lm_head, hidden_states, *args, **kwargs)
        return logits


def replace_logits_layer() -> None:
    """Have vLLM use `GatedLogitsLayer` in the models that this process loads from now on.

    Raises:
        ModelError: If this version of vLLM does not allow it, or another plug-in has done the same.
    """
    from vllm.model_executor import custom_op

    other = custom_op.op_registry_oot.get(_NAME)
    if other is GatedLogitsLayer:
        return
    if other is not None or not issubclass(logits_processor.LogitsProcessor, PluggableLayer):
        raise ModelError(
            "vLLM's LogitsProcessor layer can't be replaced here"
            + (f": {other.__module__} has done so" if other is not None else ""),
            hint="unset MARA_HEADS to run without heads; tested versions are in `mara_integrations.vllm`",
        )
    PluggableLayer.register_oot(name=_NAME)(GatedLogitsLayer)


def is_replaced() -> bool:
    """Whether `replace_logits_layer` was called in this process."""
    from vllm.model_executor import custom_op

    return custom_op.op_registry_oot.get(_NAME) is GatedLogitsLayer


def _refuse(config: Any) -> None:
    for is_on, what, flag in (
        (config.speculative_config is not None, "speculative decoding", "--speculative-config"),
        (
            getattr(config.parallel_config, "enable_batch_sharded_sampling", False),
            "batch-sharded sampling",
            "--enable-batch-sharded-sampling",
        ),
    ):
        if is_on:
            raise ConfigError(f"heads can't run with {what}", hint=f"leave out {flag}, or unset MARA_HEADS")
