"""Keys and values of many sequences, each with a length of its own; forgetting is a length, keeping a branch is a move.

Rows in use are kept contiguous from 0, so that a batch of single tokens reads a view instead of a copy. Callers hold
handles, which stay valid while rows move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KeptRow:
    """Keys and values of a row's first tokens by layer, (Hkv, length, D) each."""

    layers: dict[int, tuple[Tensor, Tensor]]

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for pair in self.layers.values() for t in pair)


class KVCache:
    """A slot for each token of each row: committed tokens at slots 0..length-1, held branches after them.

    Args:
        keep_memory: Hold it while no row is open, for those who remember where it is.

    Attributes:
        version: Changes whenever the memory moves.
    """

    def __init__(self, keep_memory: bool = False) -> None:
        self._keep_memory = keep_memory
        self.version = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values: (rows, Hkv, slots, D)
        self._handles: list[int] = []  # handle of the sequence in each row
        self._rows: dict[int, int] = {}  # handle -> row
        self._lengths: dict[int, int] = {}
        self._branches: dict[int, int] = {}
        self._next_handle = 0
        self._num_rows = self._num_slots = 0

    def open(self, kept: KeptRow | None = None, length: int = 0) -> int:
        """A handle on a new row, empty or with the first `length` tokens of a kept one."""
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self._rows[handle] = len(self._handles)
        self._handles.append(handle)
        self._lengths[handle] = self._branches[handle] = 0
        if kept is not None:
            self.reserve(length)
            for layer, (keys, values) in kept.layers.items():
                stored_keys, stored_values = self._store(layer, keys.transpose(0, 1), values.transpose(0, 1))
                stored_keys[self._rows[handle], :, :length] = keys[:, :length]
                stored_values[self._rows[handle], :, :length] = values[:, :length]
            self._lengths[handle] = length
        return handle

    def keep(self, handle: int, length: int) -> KeptRow:
        """A copy of a row's first tokens."""
        row = self._rows[handle]
        return KeptRow(
            {
                layer: (keys[row, :, :length].clone(), values[row, :, :length].clone())
                for layer, (keys, values) in self._layers.items()
            }
        )

    @torch.inference_mode()  # the tensors were made in it; a row may be closed after an error outside
    def close(self, handle: int) -> None:
        """Free a row; the last row moves into its place."""
        row, last = self._rows.pop(handle), len(self._handles) - 1
        length = self._lengths.pop(handle)
        del self._branches[handle]
        moved = self._handles.pop()
        if row != last:
            length = self._lengths[moved] + self._branches[moved]
            for keys, values in self._layers.values():
                keys[row, :, :length] = keys[last, :, :length]
                values[row, :, :length] = values[last, :, :length]
            self._handles[row], self._rows[moved] = moved, row
        if not self._handles and not self._keep_memory:  # idle: give it back
            self._layers.clear()
            self._num_rows = self._num_slots = 0
            self.version += 1

    @property
    def num_open(self) -> int:
        """Rows in use."""
        return len(self._handles)

    @property
    def num_used(self) -> int:
        """Slots up to the furthest that any row uses."""
        return max((self._lengths[handle] + self._branches[handle] for handle in self._handles), default=0)

    def row(self, handle: int) -> int:
        """Where a sequence is now."""
        return self._rows[handle]

    def length(self, handle: int) -> int:
        """Committed tokens."""
        return self._lengths[handle]

    def branches(self, handle: int) -> int:
        """Siblings held for the next position."""
        return self._branches[handle]

    def extend(self, handle: int, count: int) -> None:
        """Count tokens just written at the end as committed."""
        assert not self._branches[handle], "a chain can't follow undecided branches"
        self._lengths[handle] += count

    def branch(self, handle: int, count: int) -> None:
        """Count siblings just written after the committed tokens as held."""
        self._branches[handle] += count

    def retract(self, handle: int, count: int, held: bool) -> None:
        """Take committed tokens back from the end; with `held`, the first of them stays as a branch."""
        self._lengths[handle] -= count
        self._branches[handle] = int(held)

    def commit(self, handles: Sequence[int], branches: Sequence[int]) -> None:
        """Keep one branch of each row and forget its siblings."""
        moves = [
            (self._rows[h], self._lengths[h], self._lengths[h] + b) for h, b in zip(handles, branches, strict=True)
        ]
        moves = [(row, to, origin) for row, to, origin in moves if to != origin]
        if moves:
            device = next(iter(self._layers.values()))[0].device
            rows, to, origin = torch.tensor(moves, device=device).T
            for keys, values in self._layers.values():
                keys[rows, :, to] = keys[rows, :, origin]
                values[rows, :, to] = values[rows, :, origin]
        for handle in handles:
            self._lengths[handle] += 1
            self._branches[handle] = 0

    def reserve(self, num_slots: int, num_rows: int = 0) -> None:
        """Make room for every open row, or more rows, and this many slots; grows by doubling."""
        num_rows = max(num_rows, self.num_open)
        if num_rows <= self._num_rows and num_slots <= self._num_slots:
            return
        self.version += 1
        if num_rows > self._num_rows:
            self._num_rows = max(num_rows, min(2 * self._num_rows, self._num_rows + 64))
        if num_slots > self._num_slots:
            self._num_slots = max(num_slots + 64, min(2 * self._num_slots, self._num_slots + 1024))
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = (self._grown(keys), self._grown(values))

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(self._num_rows, old.shape[1], self._num_slots, old.shape[3])
        new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def write(self, layer: int, rows: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store T tokens, keys and values of shape (T, Hkv, D); returns the layer's whole store."""
        stored_keys, stored_values = self._store(layer, keys, values)
        stored_keys[rows, :, slots] = keys
        stored_values[rows, :, slots] = values
        return stored_keys, stored_values

    def _store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's store, made like these tensors of shape (T, Hkv, D) when it is first written to."""
        if layer not in self._layers:
            room = (self._num_rows, keys.shape[1], self._num_slots)
            self._layers[layer] = (keys.new_zeros(*room, keys.shape[2]), values.new_zeros(*room, values.shape[2]))
        return self._layers[layer]

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for pair in self._layers.values() for t in pair)
