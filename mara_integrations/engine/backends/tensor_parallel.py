"""The backend of a model that several processes hold together, each with some of its attention heads; see `ranks`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from mara_integrations.engine.backends.kv_cache import KeptRow
from mara_integrations.engine.backends.packed import PackedBackend
from mara_integrations.engine.backends.prefix_cache import Prefix
from mara_integrations.engine.backends.probe import probed, why_not_packed
from mara_integrations.engine.backends.protocol import Backend, RowSize, Segment
from mara_integrations.errors import ModelError
from mara_integrations.models import ranks
from mara_integrations.models.embeddings import rows_of


@dataclass(frozen=True, slots=True)
class _KeptParts:
    """Keys and values of a row's first tokens, those of its own heads in each process."""

    parts: ranks.Shared[KeptRow]

    @property
    def num_bytes(self) -> int:
        """Memory held in this process."""
        return self.parts.value.num_bytes


class SpreadBackend(Backend):
    """A packed backend in each of the processes that hold a model together; every call runs in all of them.

    Args:
        parts: The model in all of them.
        name: Name of the model.

    Raises:
        ModelError: If it can't be decoded packed; the others can't follow the serial path.
    """

    def __init__(self, parts: ranks.Shared[PreTrainedModel], name: str) -> None:
        self._model = parts
        self._parts = ranks.shared(_packed_part, parts, name)

    def _everywhere(self, method: str, *arguments: Any) -> Any:
        return ranks.everywhere(_ask, method, self._parts, *arguments)

    @property
    @override
    def device(self) -> torch.device:
        return self._parts.value.device

    @override
    def open(self, kept: Any = None, length: int = 0) -> int:
        row: int = self._everywhere("open", kept and kept.parts, length)
        return row

    @override
    def keep(self, row: int, length: int) -> Prefix | None:
        return _KeptParts(ranks.shared(_ask, "keep", self._parts, row, length))

    @override
    def fork(self, row: int) -> int:
        copied: int = self._everywhere("fork", row)
        return copied

    @override
    def close(self, row: int) -> None:
        self._everywhere("close", row)

    @override
    def feed(self, segments: Sequence[Segment]) -> Tensor:
        hidden: Tensor = self._everywhere("feed", segments)
        return hidden

    @override
    def commit(self, rows: Sequence[int], branches: Sequence[int]) -> None:
        self._everywhere("commit", rows, branches)

    @property
    @override
    def can_retract(self) -> bool:
        return True

    @override
    def retract(self, row: int, count: int, *, held: bool) -> None:
        ranks.everywhere(_retract, self._parts, row, count, held)

    @property
    @override
    def max_siblings(self) -> int:
        return self._parts.value.max_siblings

    @override
    def drop_siblings(self, row: int) -> None:
        self._everywhere("drop_siblings", row)

    @override
    def bytes_for(self, sizes: Sequence[RowSize]) -> int:
        return self._parts.value.bytes_for(sizes)  # of this process; the others hold as much

    @override
    def kept_bytes(self, num_tokens: int) -> int | None:
        return self._parts.value.kept_bytes(num_tokens)

    @override
    def logits(self, hidden: Tensor) -> Tensor:
        return ranks.everywhere(_logits, self._parts, hidden.cpu())

    @override
    def output_embeddings(self, token_ids: Tensor) -> Tensor:
        rows: Tensor = ranks.everywhere(_output_embeddings, self._model, token_ids.tolist())
        return rows.float().to(self.device)


@torch.inference_mode()
def _ask(method: str, backend: PackedBackend, *arguments: Any) -> Any:
    return getattr(backend, method)(*arguments)


def _retract(backend: PackedBackend, row: int, count: int, held: bool) -> None:
    backend.retract(row, count, held=held)


@torch.inference_mode()
def _logits(backend: PackedBackend, hidden: Tensor) -> Tensor:
    return backend.logits(hidden.to(backend.device))


def _packed_part(model: PreTrainedModel, name: str) -> Backend:
    """Make the packed backend of one process; all processes accept or refuse it alike."""
    reason = why_not_packed(model)
    if not reason:
        packed, reason = probed(PackedBackend, model)
        if packed is not None:
            return packed
    num_heads = getattr(model.config.get_text_config(), "num_key_value_heads", None)
    raise ModelError(
        f"{name} ({type(model).__name__}) can't be decoded by several processes: {reason}",
        hint=f"their number must divide that of its key heads, {num_heads}; device_map=auto needs only one process",
    )


def _output_embeddings(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    return rows_of((model.get_output_embeddings() or model.get_input_embeddings()).weight, token_ids)
