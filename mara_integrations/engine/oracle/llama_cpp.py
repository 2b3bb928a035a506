"""llama.cpp as a model for the reference: every position is computed anew, in one sequence, with nothing kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mara_integrations.engine.backends.llama_cpp import LlamaCppBackend
from mara_integrations.engine.backends.protocol import Segment
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.models.llama_cpp.model import LlamaCppModel

# Keys and values are in half precision, and layers round their inputs to 8 bits: a last digit can decide about either.
# Seen on a CPU with AVX2: none for quantised files, 1e-3 for float32.
_NOISE = 0.0078
# Tokens that its first context has room for; a longer text gets another.
_FEW_TOKENS = 1024


class LlamaCppOracle:
    """A `PlainModel` on a context of its own.

    Args:
        model: The loaded file.
    """

    def __init__(self, model: LlamaCppModel) -> None:
        self._model = model
        self._num_tokens, self._backend = _FEW_TOKENS, self._new_backend(_FEW_TOKENS)

    @property
    def noise(self) -> float:
        """See `PlainModel`."""
        return _NOISE

    @torch.inference_mode()
    def run(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `PlainModel`."""
        if len(token_ids) > self._num_tokens:
            self._num_tokens = 2 * len(token_ids)
            self._backend = self._new_backend(self._num_tokens)
        row = self._backend.open()
        try:
            state = self._backend.feed([Segment(row, token_ids, only_last=True)])[-1]
            return state, self._backend.next_logits(state[None], [row])[0]
        finally:
            self._backend.close(row)

    def _new_backend(self, num_tokens: int) -> LlamaCppBackend:
        """Make a backend with room for so many tokens, not for all of the model's window."""
        kv_bytes = max(1 << 20, num_tokens * self._model.cell_bytes)
        return LlamaCppBackend(self._model, EngineLimits(max_live=1, prefix_cache_bytes=0, kv_bytes=kv_bytes))

    def output_embeddings(self, token_ids: Tensor) -> Tensor:
        """See `PlainModel`."""
        return self._model.output_embeddings(token_ids)
