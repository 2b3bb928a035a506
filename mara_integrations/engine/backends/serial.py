"""The serial backend: one sequence a forward pass, for models whose attention can't take trees of candidates."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

from mara_integrations.engine.backends.forward import (
    cache_argument,
    decoder_of,
    input_embeddings,
    logits_function,
    output_embeddings,
    takes,
)
from mara_integrations.engine.backends.prefix_cache import Prefix
from mara_integrations.engine.backends.protocol import Backend, RowSize, Segment

# Siblings that a row holds at most: each has a copy of the whole row.
_MAX_SIBLINGS = 8
# Caches of different lengths that are measured.
_NUM_MEASURED = 3


@dataclass(slots=True)
class _SerialRow:
    cache: Any
    length: int = 0
    branches: list[Any] = field(default_factory=list)


class SerialBackend(Backend):
    """One forward a segment, and one a sibling, each from a snapshot of its row's cache.

    Exact for every causal model transformers can run, and slow: for models whose attention can't take trees (position
    biases, recurrent states) and as the oracle of the packed backend.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._decoder = decoder_of(model)
        self._to_logits = logits_function(model)
        self._rows: dict[int, _SerialRow] = {}
        self._next_row = 0
        self._seen_bytes: dict[int, int] = {}  # of caches, by length

    @property
    @override
    def device(self) -> torch.device:
        return input_embeddings(self._model).device

    @override
    def keep(self, row: int, length: int) -> Prefix | None:
        return None

    @override
    def open(self, kept: Any = None, length: int = 0) -> int:
        assert kept is None, "this backend keeps no prefixes"
        row, self._next_row = self._next_row, self._next_row + 1
        self._rows[row] = _SerialRow(DynamicCache(config=self._model.config))
        return row

    @override
    def fork(self, row: int) -> int:
        copied, source = self.open(), self._rows[row]
        self._rows[copied] = _SerialRow(_snapshot(source.cache), source.length)
        return copied

    @override
    def close(self, row: int) -> None:
        del self._rows[row]

    @override
    def feed(self, segments: Sequence[Segment]) -> Tensor:
        hidden, grown = [], []  # rows change only when all have been run: a failure leaves them as they were
        for segment in segments:
            row = self._rows[segment.row]
            if segment.siblings:
                branches = [_snapshot(row.cache) for _ in segment.token_ids]
                for branch, token_id in zip(branches, segment.token_ids, strict=True):
                    hidden.append(self._run(branch, [token_id], row.length))
                grown.append(replace(row, branches=[*row.branches, *branches]))
            else:
                cache = _snapshot(row.cache)
                hidden.append(self._run(cache, segment.token_ids, row.length))
                grown.append(replace(row, cache=cache, length=row.length + len(segment.token_ids)))
        self._rows.update(zip((segment.row for segment in segments), grown, strict=True))
        if len(self._seen_bytes) < _NUM_MEASURED:
            for row in grown:
                self._seen_bytes[row.length] = _cache_bytes(row.cache)
        return torch.cat(hidden)

    @override
    def commit(self, rows: Sequence[int], branches: Sequence[int]) -> None:
        for handle, branch in zip(rows, branches, strict=True):
            row = self._rows[handle]
            row.cache, row.branches = row.branches[branch], []
            row.length += 1

    @property
    @override
    def can_retract(self) -> bool:
        return False  # not every kind of state can be cut

    @property
    @override
    def max_siblings(self) -> int:
        return _MAX_SIBLINGS

    @override
    def drop_siblings(self, row: int) -> None:
        self._rows[row].branches = []

    @override
    def bytes_for(self, sizes: Sequence[RowSize]) -> int:
        fixed, each = self._memory
        return sum((1 + size.num_siblings) * (fixed + size.num_tokens * each) for size in sizes)

    @override
    def kept_bytes(self, num_tokens: int) -> int | None:
        return None

    @property
    def _memory(self) -> tuple[int, int]:
        """Bytes of a cache, and of each token in it; from the shortest and the longest cache seen so far."""
        if len(self._seen_bytes) < 2:
            return 0, 0
        (short, few), (long, many) = min(self._seen_bytes.items()), max(self._seen_bytes.items())
        each = (many - few) // (long - short)
        return max(0, few - each * short), each

    @override
    def logits(self, hidden: Tensor) -> Tensor:
        return self._to_logits(hidden)

    @override
    def output_embeddings(self, token_ids: Tensor) -> Tensor:
        return output_embeddings(self._model, token_ids).to(self.device)

    def _run(self, cache: Any, token_ids: Sequence[int], start: int) -> Tensor:
        ids = torch.tensor([token_ids], device=self.device)
        positions = torch.arange(start, start + len(token_ids), device=self.device)[None]
        arguments: dict[str, Any] = {"input_ids": ids, cache_argument(self._decoder): cache, "use_cache": True}
        if takes(self._decoder, "position_ids"):
            arguments["position_ids"] = positions
        hidden: Tensor = self._decoder(**arguments).last_hidden_state[0]
        return hidden.to(self.device)  # of a model spread over devices, the last one's


def _cache_bytes(cache: Any) -> int:
    """Memory of the tensors that a cache's layers hold."""
    tensors = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _snapshot(cache: Any) -> Any:
    """A cache that can grow without changing the one it came from."""
    if all(type(layer) is DynamicLayer for layer in cache.layers):  # update() makes new tensors: sharing is safe
        branch = copy.copy(cache)
        branch.layers = [copy.copy(layer) for layer in cache.layers]
        return branch
    return copy.deepcopy(cache)
