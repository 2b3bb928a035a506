"""Keeps the features that Q-heads compute for candidate tokens. They are the same at every position."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from mara_integrations.heads.q import QHead

OutputEmbeddings: TypeAlias = Callable[[Tensor], Tensor]  # token ids (N,) to rows of the output embeddings (N, d)


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Features that a head makes of tokens.

    Attributes:
        version: Version of the weights that they were made by.
        features: Shape (V, r); memory is taken for those that are known.
        is_known: Which are made already, (V,).
    """

    version: tuple[int, ...]
    features: Tensor
    is_known: Tensor


class CandidateFeatures:
    """Features of candidates, made at their first use and kept for the heads used last.

    Args:
        max_bytes: Most memory; 0 keeps nothing. A table has V x r numbers, 13 MB for SmolLM2-135M.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self._max_bytes = max_bytes
        self._tables: OrderedDict[QHead, _Table] = OrderedDict()  # least recently used first

    def of(self, head: QHead, token_ids: Tensor, embeddings: OutputEmbeddings, vocab_size: int) -> Tensor:
        """Return `QHead.candidate_features` of tokens, (N,) to (N, r).

        Args:
            head: The head.
            token_ids: The tokens, (N,).
            embeddings: Gives their output embeddings.
            vocab_size: Number of all tokens.
        """
        weight = head.candidate_linear.weight
        num_kept = self._max_bytes // (vocab_size * len(weight) * weight.element_size())
        if not num_kept:
            return head.candidate_features(embeddings(token_ids))
        table = self._table(head, vocab_size)
        while len(self._tables) > num_kept:
            self._tables.popitem(last=False)
        is_known = table.is_known[token_ids]
        if not bool(is_known.all()):
            new = token_ids[~is_known]
            table.features[new] = head.candidate_features(embeddings(new))
            table.is_known[new] = True
        return table.features[token_ids]

    def _table(self, head: QHead, vocab_size: int) -> _Table:
        table, version = self._tables.pop(head, None), version_of(head.candidate_linear.parameters())
        if table is None or table.version != version or len(table.is_known) != vocab_size:
            weight = head.candidate_linear.weight
            shape = vocab_size, len(weight)
            features = torch.empty(shape, dtype=weight.dtype, device=weight.device)
            table = _Table(version, features, torch.zeros(vocab_size, dtype=torch.bool, device=weight.device))
        self._tables[head] = table
        return table


def version_of(parameters: Iterable[nn.Parameter]) -> tuple[int, ...]:
    """Return what changes when weights do: a head may be trained between two requests."""
    return tuple(n for p in parameters for n in (p.data_ptr(), 0 if p.is_inference() else p._version))
