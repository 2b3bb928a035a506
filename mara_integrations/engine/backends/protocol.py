"""The protocol of a backend: it feeds tokens to the base model and returns their final hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mara_integrations.engine.backends.prefix_cache import Prefix


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens fed for one row in one forward: a chain, or siblings of its next position.

    Attributes:
        row: The row.
        token_ids: The tokens.
        siblings: Whether they are siblings.
        only_last: Only the hidden state of the last token is needed; those of the others may be zeros.
    """

    row: int
    token_ids: Sequence[int]
    siblings: bool = False
    only_last: bool = False


class RowSize(NamedTuple):
    """The size that a row may grow to.

    Attributes:
        num_tokens: Tokens of prompt and reply.
        num_siblings: Candidates of a position that are held together.
    """

    num_tokens: int
    num_siblings: int


class Reserve(NamedTuple):
    """Memory that a backend sets aside for good when it is made.

    Attributes:
        row_bytes: Memory for rows.
        prefix_bytes: Memory for kept prefixes.
        num_prefixes: The most prefixes that it keeps.
    """

    row_bytes: int
    prefix_bytes: int
    num_prefixes: int


class Backend(Protocol):
    """The operations of a model that gated decoding needs."""

    @property
    def reserve(self) -> Reserve | None:
        """Memory set aside for rows and kept prefixes; None if memory follows the rows."""
        return None

    @property
    def device(self) -> torch.device:
        """Device of hidden states and logits."""

    def open(self, kept: Any = None, length: int = 0) -> int:
        """Open a row, empty or with the first `length` tokens of what `keep` returned."""

    def keep(self, row: int, length: int) -> Prefix | None:
        """Return a copy of a row's first tokens, to open others with; None if the model's state can't be cut."""

    def fork(self, row: int) -> int:
        """Open a row with the same tokens as another."""

    def close(self, row: int) -> None:
        """Free a row."""

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
        raise AssertionError("ask can_retract first")

    @property
    def max_siblings(self) -> int:
        """The most siblings that a row should hold; see `drop_siblings`."""

    def drop_siblings(self, row: int) -> None:
        """Forget the siblings that a row holds; those fed next are numbered from 0 again."""

    def bytes_for(self, sizes: Sequence[RowSize]) -> int:
        """Return the most memory that rows take at any time while they grow to these sizes, in bytes."""

    def kept_bytes(self, num_tokens: int) -> int | None:
        """Return the memory of what `keep` returns for so many tokens, in bytes; None where it keeps nothing."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the next-token logits of hidden states, (N, d) to (N, V)."""

    def next_logits(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the next-token logits of the last tokens of rows, and of tokens drafted behind them, (N, d) to (N, V).

        Args:
            hidden: Their states. Only a backend that can retract is asked for drafted tokens.
            rows: The row of each.
        """
        return self.logits(hidden)

    def output_embeddings(self, token_ids: Tensor) -> Tensor:
        """Return the rows of the output embeddings of tokens, (N,) to float32 (N, d), for heads that judge by them.

        Raises:
            ModelError: If the model does not show them.
        """
