"""The packed backend: tokens of many sequences in one forward pass, each seeing its own prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from mara_integrations.engine.backends import attention
from mara_integrations.engine.backends.forward import (
    decoder_of,
    input_embeddings,
    logits_function,
    output_embeddings,
)
from mara_integrations.engine.backends.kv_cache import KVCache
from mara_integrations.engine.backends.prefix_cache import Prefix
from mara_integrations.engine.backends.protocol import Backend, RowSize, Segment

# Siblings that a row holds at most: more are rarely fed, and each takes the memory of a token.
_MAX_SIBLINGS = 64


class PackedBackend(Backend):
    """One forward for everything that waits: all segments in one packed row, with our attention and our cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        attention.install(model)
        self._model = model
        self._decoder = decoder_of(model)
        self._to_logits = logits_function(model)
        self._cache = KVCache()

    @property
    @override
    def device(self) -> torch.device:
        return input_embeddings(self._model).device

    @property
    def num_bytes(self) -> int:
        """Memory held by keys and values."""
        return self._cache.num_bytes

    @override
    def open(self, kept: Any = None, length: int = 0) -> int:
        return self._cache.open(kept, length)

    @override
    def keep(self, row: int, length: int) -> Prefix | None:
        return self._cache.keep(row, length)

    @override
    def fork(self, row: int) -> int:
        length = self._cache.row(row).length
        return self._cache.open(self._cache.keep(row, length), length)

    @override
    def close(self, row: int) -> None:
        self._cache.close(row)

    @override
    def feed(self, segments: Sequence[Segment]) -> Tensor:
        layout = [(segment.row, len(segment.token_ids), segment.siblings) for segment in segments]
        context, positions = attention.PackedContext.build(self._cache, layout, self.device)
        token_ids = torch.tensor([t for segment in segments for t in segment.token_ids], device=self.device)  # (T,)
        hidden = self._forward(token_ids, positions, context)
        for row, width, siblings in layout:
            (self._cache.hold if siblings else self._cache.extend)(row, width)
        return hidden

    def _forward(self, token_ids: Tensor, positions: Tensor, context: attention.PackedContext) -> Tensor:
        """Hidden states of a packed row, (T,) to (T, d)."""
        output = self._decoder(input_ids=token_ids[None], **attention.forward_arguments(context, positions))
        return cast(Tensor, output.last_hidden_state[0])

    @override
    def commit(self, rows: Sequence[int], branches: Sequence[int]) -> None:
        self._cache.commit(rows, branches)

    @property
    @override
    def can_retract(self) -> bool:
        return True

    @override
    def retract(self, row: int, count: int, *, held: bool) -> None:
        self._cache.retract(row, count, held)

    @property
    @override
    def max_siblings(self) -> int:
        return _MAX_SIBLINGS

    @override
    def drop_siblings(self, row: int) -> None:
        self._cache.drop_siblings(row)

    @override
    def bytes_for(self, sizes: Sequence[RowSize]) -> int:
        return self._cache.bytes_for([size.num_tokens + size.num_siblings for size in sizes])

    @override
    def kept_bytes(self, num_tokens: int) -> int | None:
        return num_tokens * self._cache.slot_bytes

    @override
    def logits(self, hidden: Tensor) -> Tensor:
        return self._to_logits(hidden)

    @override
    def output_embeddings(self, token_ids: Tensor) -> Tensor:
        return output_embeddings(self._model, token_ids).to(self.device)
