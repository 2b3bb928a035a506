"""The gate of one model in a worker of vLLM: from logits and what they were made of to gated logits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

from mara_integrations.errors import ConfigError, MaraError, ModelError
from mara_integrations.vllm import logits_layer
from mara_integrations.vllm.kernel import Layout, gate_logits
from mara_integrations.vllm.requests import gated_request
from mara_integrations.vllm.tables import GatedRequest, HeadTables

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class EndedRequest:
    """A request whose head was lost after it came in: it ends, as it must not go on without.

    Attributes:
        token_id: A token that ends the reply.
    """

    token_id: int


Admitted: TypeAlias = GatedRequest | EndedRequest


class BatchGate:
    """Gates batches; the layout of a batch is kept until requests come or go.

    Args:
        vllm_config: Config of the engine.
        device: Where the logits are.

    Raises:
        ConfigError: If vLLM was told not to load the rest of this plug-in.
    """

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        if not logits_layer.is_replaced():
            raise ConfigError("vLLM has not loaded the plug-in 'mara'", hint="add it to VLLM_PLUGINS")
        model = vllm_config.model_config
        self._device, self._models = device, {model.get_hidden_size(): model.model}
        self._tables: HeadTables | None = None
        self._requests: list[Admitted | None] = []
        self._layout: Layout | None = None

    def admit(self, params: Any) -> Admitted | None:
        """Return how a request is gated, None where it is not; it was validated when it came in."""
        try:
            return gated_request(params.extra_args, params.temperature, self._device, self._models)
        except MaraError as error:
            _log.error("a request is ended, as its head can't be used any more: %s", error)
            return EndedRequest(min(params.all_stop_token_ids, default=0))

    def apply(self, logits: Tensor, requests: Sequence[Admitted | None]) -> Tensor:
        """Gate the logits of a step, in place.

        Args:
            logits: Shape (B, V), float32.
            requests: The request of each row, B of them; empty where none is gated.

        Raises:
            ModelError: If hidden states and logits do not belong together, or output embeddings can't be read.
        """
        seen = logits_layer.take()
        if not any(request is not None for request in requests):
            return logits
        if seen is None or len(seen.hidden) != len(logits):
            raise ModelError(
                "the hidden states of these logits were not seen",
                hint="this version of vLLM or this model makes logits elsewhere; run it without MARA_HEADS",
            )
        if self._tables is None:
            self._tables = HeadTables(*_output_embeddings(seen.output_layer, logits.shape[1]))
        if list(requests) != self._requests:
            gated = [request if isinstance(request, GatedRequest) else None for request in requests]
            self._requests, self._layout = list(requests), self._tables.layout(gated, logits.shape[1])
        if self._layout is not None:
            reduce = tensor_model_parallel_all_reduce if get_tensor_model_parallel_world_size() > 1 else None
            gate_logits(logits, seen.hidden, self._layout, reduce)
        for row, request in enumerate(requests):
            if isinstance(request, EndedRequest):
                logits[row] = -torch.inf
                logits[row, request.token_id] = 0.0
        return logits


def _output_embeddings(layer: Any, vocab_size: int) -> tuple[Tensor, int]:
    """Return the output embeddings of this rank's tokens, and the first of these tokens."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ModelError(
            f"the output embeddings of this model can't be read: {type(layer).__name__} is quantised",
            hint="serve a model whose lm_head is not quantised",
        )
    shard = getattr(layer, "shard_indices", None)
    first, end = (shard.org_vocab_start_index, shard.org_vocab_end_index) if shard is not None else (0, vocab_size)
    return weight.detach()[: min(end, vocab_size) - first], first
