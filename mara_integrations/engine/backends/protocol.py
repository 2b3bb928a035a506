"""The protocol of a backend: it feeds tokens to the base model and returns their final hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mara_integrations.engine.backends.prefix_cache import Prefix


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens fed for one row in one forward: a chain, or siblings of its next position."""

    row: int
    token_ids: Sequence[int]
    siblings: bool = False


class Backend(Protocol):
    """What gated decoding asks of a model."""

    @property
    def device(self) -> torch.device:
        """Where hidden states and logits are."""

    def open(self, kept: Any = None, length: int = 0) -> int:
        """A new row, empty or with the first `length` tokens of what `keep` returned."""

    def keep(self, row: int, length: int) -> Prefix | None:
        """A copy of a row's first tokens to open others with; None where the model's state can't be cut."""

    def fork(self, row: int) -> int:
        """A new row with the same tokens."""

    def close(self, row: int) -> None:
        """Forget a row."""

    def feed(self, segments: Sequence[Segment]) -> Tensor:
        """Run all segments, of one row each, through the model.

        A chain is part of its row afterwards. Siblings are held, numbered from 0 in feeding order over any number of
        calls, until `commit`. If it raises, no row has changed.

        Returns:
            Hidden states after the final norm, of every token in order, shape (T, d).
        """

    def commit(self, rows: Sequence[int], branches: Sequence[int]) -> None:
        """Append the named branch to each row and forget its siblings."""

    @property
    def can_retract(self) -> bool:
        """Whether tokens of a chain can be taken back."""

    def retract(self, row: int, count: int, *, held: bool) -> None:
        """Take back the last `count` tokens of a row's chain; with `held`, the first of them stays as branch 0."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of hidden states, (N, d) to (N, V)."""

    def output_embeddings(self, token_ids: Tensor) -> Tensor:
        """Return the rows of the output embeddings of tokens, (N,) to float32 (N, d), for heads that judge by them.

        Raises:
            ModelError: If the model does not show them.
        """
