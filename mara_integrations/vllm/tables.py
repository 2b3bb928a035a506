"""Q-heads in slots of stacked tensors, with what they make of every token tabulated; lays out batches for `kernel`.

A head's features of a candidate do not depend on the position, so that each head has a table over the vocabulary:
V x r numbers, 13 MB for SmolLM2-135M in float32, 17 MB for Llama 3 8B in half precision. Knows nothing of vLLM.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mara_integrations.engine.head_stacks import stack_shape
from mara_integrations.heads.compose import Head, q_parts
from mara_integrations.heads.q import QHead
from mara_integrations.vllm.kernel import Block, Layout, RowSettings, Share

# Tables of heads that no running request uses are kept up to this size, all heads of one shape together.
MAX_IDLE_BYTES = 1 << 30
_TOKENS_AT_ONCE = 4096  # a table is made in parts: embeddings are float32 for a moment
# Rows of a stacked evaluation, padding and idle heads included, for each row asked for; beyond, heads go one by one.
_MAX_PADDING = 2


@dataclass(frozen=True, slots=True, eq=False)
class GatedRequest:
    """How a request is gated.

    Attributes:
        head: One Q-head, or several as one.
        strength: Dial on the head, above 0.
        top_k: Number of most probable tokens that are candidates.
        top_p: Share of their probability that is kept.
        min_candidates: Candidates kept whatever top-k and top-p say.
        temperature: Temperature of the request; 1 where decoding is greedy.
    """

    head: Head
    strength: float
    top_k: int
    top_p: float
    min_candidates: int
    temperature: float = 1.0


class HeadTables:
    """Heads that requests use, in slots.

    Args:
        embeddings: Output embeddings of this rank's tokens, shape (V, d).
        first_token: The first of these tokens.
        max_idle_bytes: See `MAX_IDLE_BYTES`.
    """

    def __init__(self, embeddings: Tensor, first_token: int = 0, *, max_idle_bytes: int = MAX_IDLE_BYTES) -> None:
        self._embeddings, self._first_token, self._max_idle_bytes = embeddings, first_token, max_idle_bytes
        self._slots: dict[tuple[Any, ...], _Slots] = {}

    @torch.inference_mode()
    def layout(self, requests: Sequence[GatedRequest | None], vocab_size: int) -> Layout | None:
        """Lay out a batch; tabulates heads that are new.

        Args:
            requests: The request of each row of the logits; None where it is not gated.
            vocab_size: Number of logits of a row.

        Returns:
            None where no row is gated.
        """
        gated = [(row, request) for row, request in enumerate(requests) if request is not None]
        if not gated:
            return None
        device, own = self._embeddings.device, [request for _, request in gated]
        num_kept = [min(max(request.top_k, request.min_candidates), vocab_size) for request in own]

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype)[:, None].to(device, non_blocking=True)

        settings = RowSettings(
            column(num_kept, torch.long),
            column([1.0 - request.top_p for request in own]),
            column([request.min_candidates for request in own], torch.long),
            column([request.temperature for request in own]),
            column([request.strength for request in own]),
        )
        rows = None if len(gated) == len(requests) else torch.tensor([row for row, _ in gated]).to(device)
        return Layout(rows, settings, self._shares(own), max(num_kept))

    def _shares(self, requests: Sequence[GatedRequest]) -> list[Share]:
        """Group the evaluations of all requests by the shape of their heads."""
        asked: dict[tuple[Any, ...], dict[QHead, list[tuple[int, float]]]] = {}
        for row, request in enumerate(requests):
            for part, factor in q_parts(request.head).items():
                asked.setdefault(stack_shape(part), {}).setdefault(part, []).append((row, factor))
        for shape in list(self._slots):
            if shape not in asked and self._slots[shape].num_bytes > self._max_idle_bytes:
                del self._slots[shape]
        shares = []
        for shape, askers in asked.items():
            slots = self._slots.setdefault(shape, _Slots(self._embeddings, self._max_idle_bytes))
            slots.place(list(askers))
            shares.append(slots.share(askers, self._first_token))
        return shares


class _Slots:
    """Heads of one shape, each with a slot of the stacked weights and of the stacked tables."""

    def __init__(self, embeddings: Tensor, max_idle_bytes: int) -> None:
        self._embeddings, self._max_idle_bytes = embeddings, max_idle_bytes
        self._slots: OrderedDict[QHead, int] = OrderedDict()  # least recently asked first
        self._weights: dict[str, Tensor] = {}
        self._table = embeddings.new_zeros(0)

    @property
    def num_bytes(self) -> int:
        """Memory of the tables."""
        return self._table.numel() * self._table.element_size()

    def place(self, heads: Sequence[QHead]) -> None:
        """Give each head a slot: a free one, that of an idle head, or one more."""
        for head in heads:
            if head in self._slots:
                self._slots.move_to_end(head)
        new = [head for head in heads if head not in self._slots]
        if not new:
            return
        idle = [head for head in self._slots if head not in set(heads)]
        room = len(self._table) - len(self._slots)
        if len(new) > room and self._bytes_with(len(new) - room, new[0]) > self._max_idle_bytes:
            for head in idle[: len(new) - room]:
                del self._slots[head]
            room = len(self._table) - len(self._slots)
        if len(new) > room:
            self._grow(new[0], len(self._slots) + len(new))
        free = sorted(set(range(len(self._table))) - set(self._slots.values()))
        for head, slot in zip(new, free, strict=False):
            self._fill(slot, head)
            self._slots[head] = slot

    def share(self, askers: dict[QHead, list[tuple[int, float]]], first_token: int) -> Share:
        """Lay out evaluations; askers have the rows and factors of each head."""
        device = self._embeddings.device
        heads = sorted(askers, key=self._slots.__getitem__)
        slots, counts = [self._slots[head] for head in heads], [len(askers[head]) for head in heads]
        rows = torch.tensor([row for head in heads for row, _ in askers[head]]).to(device, non_blocking=True)
        factors = torch.tensor([[factor] for head in heads for _, factor in askers[head]], dtype=torch.float32)
        of_each = torch.tensor(slots).repeat_interleave(torch.tensor(counts)).to(device, non_blocking=True)
        blocks = _blocks(slots, counts, len(self._table), device)
        factors = factors.to(device, non_blocking=True)
        return Share(self._weights, self._table, first_token, rows, of_each, factors, blocks)

    def _bytes_with(self, more: int, head: QHead) -> int:
        rank = head.config.inner_sizes[1]
        return (len(self._table) + more) * len(self._embeddings) * rank * self._dtype.itemsize

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if self._embeddings.dtype == torch.float32 else torch.float16

    def _grow(self, like: QHead, least: int) -> None:
        """Make room for at least so many heads, and for twice as many as now where these may be idle."""
        have, device = len(self._table), self._embeddings.device
        twice = max(least, 2 * have)
        size = twice if self._bytes_with(twice - have, like) <= self._max_idle_bytes else least
        rank = like.config.inner_sizes[1]
        table = torch.zeros(size, len(self._embeddings), rank, dtype=self._dtype, device=device)
        weights = {name: p.new_zeros(size, *p.shape) for name, p in like.named_parameters()}
        if have:
            table[:have] = self._table
            for name, weight in self._weights.items():
                weights[name][:have] = weight
        self._table, self._weights = table, weights

    def _fill(self, slot: int, head: QHead) -> None:
        for name, parameter in head.named_parameters():
            self._weights[name][slot] = parameter
        start = 0
        for part in self._embeddings.split(_TOKENS_AT_ONCE):
            self._table[slot, start : start + len(part)] = head.candidate_features(part.float())
            start += len(part)


def _blocks(slots: Sequence[int], counts: Sequence[int], num_slots: int, device: torch.device) -> list[Block]:
    """What is evaluated together: all slots at once, where little of that is padding; else one head after the other."""
    widest, total = max(counts), sum(counts)
    if len(slots) > 1 and num_slots * widest <= _MAX_PADDING * total:
        numbers = [slot * widest + k for slot, count in zip(slots, counts, strict=True) for k in range(count)]
        return [Block(slice(0, num_slots), slice(0, total), widest, torch.tensor(numbers).to(device))]
    blocks, start = [], 0
    for slot, count in zip(slots, counts, strict=True):
        blocks.append(Block(slice(slot, slot + 1), slice(start, start + count), count, None))
        start += count
    return blocks
