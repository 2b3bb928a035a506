"""Embeddings of tokens from a model of transformers, which one process holds, or several together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mara_integrations.models import ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def embeddings(model: PreTrainedModel | ranks.Shared[PreTrainedModel], token_ids: Sequence[int]) -> Tensor:
    """Return the input embeddings of tokens, (N,) to (N, d)."""
    return ranks.everywhere(_rows, model, token_ids) if isinstance(model, ranks.Shared) else _rows(model, token_ids)


def _rows(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    return rows_of(model.get_input_embeddings().weight, token_ids)


@torch.inference_mode()
def rows_of(table: Any, token_ids: Sequence[int]) -> Tensor:
    """Return rows of a table, (N,) to (N, d). Where processes hold parts of it, all of them have to call this."""
    ids = torch.tensor(token_ids, dtype=torch.long, device=table.device)
    if not ranks.is_spread(table):
        return torch.nn.functional.embedding(ids, table)
    from torch.distributed.tensor import DTensor, Replicate

    ids = DTensor.from_local(ids, table.device_mesh, [Replicate()], run_check=False)
    whole: Tensor = torch.nn.functional.embedding(ids, table).full_tensor()  # type: ignore[attr-defined]  # a DTensor
    return whole
