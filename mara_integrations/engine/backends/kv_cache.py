"""Keys and values of many sequences, each with its own length. Rollback changes a length; a commit moves one slot.

Rows of similar length lie side by side in a bucket: a tensor for each layer, (rows, Hkv, slots, D), that a batch of
single tokens reads without a copy. A row that outgrows its bucket moves to the next one, so a long row does not
lengthen the others. Memory follows the rows that are open: at most a quarter of a bucket's rows are spare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

# Slots of the smallest rows; above, there are two capacities to a power of two, and four for long rows.
_MIN_CAPACITY, _FINE_FROM = 64, 1024
# At most one row in so many of those in use is spare.
_MOST_SPARE = 4


@dataclass(frozen=True, slots=True)
class KeptRow:
    """Keys and values of a row's first tokens by layer, (Hkv, length, D) each."""

    layers: dict[int, tuple[Tensor, Tensor]]

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for pair in self.layers.values() for t in pair)


@dataclass(eq=False)
class Bucket:
    """Rows of one capacity. Those in use are contiguous from 0; all slots beyond what they hold are finite.

    Attributes:
        capacity: Slots of each row.
        rows: The rows in use, in order.
        layers: Keys and values by layer, (`num_allotted`, Hkv, `capacity`, D) each.
        num_allotted: Rows that there is memory for.
    """

    capacity: int
    rows: list[Row] = field(default_factory=list)
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    num_allotted: int = 0
    _num_written: int = 0  # rows from here on are still zero

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for pair in self.layers.values() for t in pair)

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values; made like these, (T, Hkv, D), when it is first asked for."""
        if layer not in self.layers:
            room = (self.num_allotted, keys.shape[1], self.capacity)
            self.layers[layer] = (keys.new_zeros(*room, keys.shape[2]), values.new_zeros(*room, values.shape[2]))
        return self.layers[layer]

    def add(self, row: Row) -> None:
        """Give a row the next place, with all slots zero."""
        index = len(self.rows)
        assert index < self.num_allotted, "there is memory for it"
        if index < self._num_written:  # another row was here: whatever it left, not even NaN may reach this one
            for keys, values in self.layers.values():
                keys[index], values[index] = 0, 0
        self._num_written = max(self._num_written, index + 1)
        self.rows.append(row)
        row.bucket, row.index = self, index

    def remove(self, row: Row) -> None:
        """Take a row out; the last one moves into its place."""
        index, last = row.index, len(self.rows) - 1
        if index != last:
            for keys, values in self.layers.values():
                keys[index], values[index] = keys[last], values[last]
            self.rows[index] = self.rows[last]
            self.rows[index].index = index
        self.rows.pop()
        row.bucket = None

    def resize(self, num_rows: int, capacity: int | None = None) -> None:
        """Change the number of rows that there is memory for, and the slots of each.

        One layer follows the other, so that little memory is held twice. If memory runs out, the bucket is as usable
        as before.
        """
        capacity = capacity or self.capacity
        self.num_allotted = min(self.num_allotted, num_rows)
        for layer, (keys, values) in self.layers.items():
            self.layers[layer] = (_resized(keys, num_rows, capacity), _resized(values, num_rows, capacity))
        self.num_allotted, self.capacity = num_rows, capacity
        self._num_written = min(self._num_written, num_rows)


@dataclass(eq=False, slots=True)
class Row:
    """A sequence's place, and what it holds: committed tokens at slots 0..length-1, its siblings behind them."""

    bucket: Bucket | None = None
    index: int = 0
    length: int = 0
    num_siblings: int = 0

    @property
    def num_used(self) -> int:
        """Slots that hold something."""
        return self.length + self.num_siblings


class KVCache:
    """A store of rows, known to callers by handles that stay valid while rows move."""

    def __init__(self) -> None:
        self._rows: dict[int, Row] = {}
        self._buckets: dict[int, Bucket] = {}  # by capacity
        self._slot_bytes: dict[int, int] = {}  # by layer; known from the first forward on
        self._next_handle = 0

    @torch.inference_mode()
    def open(self, kept: KeptRow | None = None, length: int = 0) -> int:
        """Open a row, empty or with the first `length` tokens of a kept one; returns its handle."""
        row = Row()
        if kept is not None and length:
            bucket = self._bucket(length)
            self._grow(bucket, len(bucket.rows) + 1)
            bucket.add(row)
            for layer, (keys, values) in kept.layers.items():
                stored_keys, stored_values = self._store(bucket, layer, keys.transpose(0, 1), values.transpose(0, 1))
                stored_keys[row.index, :, :length] = keys[:, :length]
                stored_values[row.index, :, :length] = values[:, :length]
            row.length = length
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self._rows[handle] = row
        return handle

    @torch.inference_mode()
    def keep(self, handle: int, length: int) -> KeptRow:
        """Copy a row's first tokens."""
        row = self._rows[handle]
        layers = row.bucket.layers if row.bucket is not None else {}
        return KeptRow(
            {
                layer: (keys[row.index, :, :length].clone(), values[row.index, :, :length].clone())
                for layer, (keys, values) in layers.items()
            }
        )

    @torch.inference_mode()  # the tensors were made in it; a row may be closed after an error outside
    def close(self, handle: int) -> None:
        """Free a row."""
        bucket = self._rows[handle].bucket
        if bucket is not None:
            bucket.remove(self._rows[handle])
            self._trim(bucket)
        del self._rows[handle]

    def row(self, handle: int) -> Row:
        """Return a row."""
        return self._rows[handle]

    @property
    def num_open(self) -> int:
        """Number of open rows."""
        return len(self._rows)

    @property
    def most_used(self) -> int:
        """Slots that the longest row uses."""
        return max((row.num_used for row in self._rows.values()), default=0)

    def reserve(self, num_slots: Mapping[int, int]) -> None:
        """Make room for so many slots in each of these rows, by handle; this may move rows."""
        joining: dict[Bucket, list[Row]] = {}
        for handle, count in num_slots.items():
            row = self._rows[handle]
            if row.bucket is None or count > row.bucket.capacity:
                joining.setdefault(self._bucket(count), []).append(row)
        left = {row.bucket for rows in joining.values() for row in rows if row.bucket is not None}
        try:
            for bucket, rows in joining.items():
                self._grow(bucket, len(bucket.rows) + len(rows))  # once for all of them
                for row in rows:
                    self._move(row, bucket)
        finally:
            for bucket in (*left, *joining):
                self._trim(bucket)

    def extend(self, handle: int, count: int) -> None:
        """Count tokens just written at the end as committed."""
        row = self._rows[handle]
        assert not row.num_siblings, "a chain can't follow undecided siblings"
        row.length += count

    def hold(self, handle: int, count: int) -> None:
        """Count tokens just written at the end as siblings."""
        self._rows[handle].num_siblings += count

    def retract(self, handle: int, count: int, held: bool) -> None:
        """Take committed tokens back from the end; with `held`, the first of them stays as a sibling."""
        row = self._rows[handle]
        row.length -= count
        row.num_siblings = int(held)

    def drop_siblings(self, handle: int) -> None:
        """Forget a row's siblings."""
        self._rows[handle].num_siblings = 0

    def commit(self, handles: Sequence[int], siblings: Sequence[int]) -> None:
        """Keep one sibling of each row and forget the others."""
        moves: dict[Bucket, list[tuple[int, int, int]]] = {}
        for handle, sibling in zip(handles, siblings, strict=True):
            row = self._rows[handle]
            assert row.bucket is not None and sibling < row.num_siblings, "the sibling was fed"
            if sibling > 0:
                moves.setdefault(row.bucket, []).append((row.index, row.length, row.length + sibling))
            row.length += 1
            row.num_siblings = 0
        for bucket, places in moves.items():
            device = next(iter(bucket.layers.values()))[0].device
            rows, to, origin = torch.tensor(places, device=device).T
            for keys, values in bucket.layers.values():
                keys[rows, :, to] = keys[rows, :, origin]
                values[rows, :, to] = values[rows, :, origin]

    def write(
        self, layer: int, bucket: Bucket, rows: Tensor, slots: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store T tokens, keys and values of shape (T, Hkv, D); returns the layer's keys and values in the bucket."""
        stored_keys, stored_values = self._store(bucket, layer, keys, values)
        stored_keys[rows, :, slots] = keys
        stored_values[rows, :, slots] = values
        return stored_keys, stored_values

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(bucket.num_bytes for bucket in self._buckets.values())

    @property
    def slot_bytes(self) -> int:
        """Memory of one token's keys and values in all layers; 0 before the first forward."""
        return sum(self._slot_bytes.values())

    def bytes_for(self, sizes: Sequence[int]) -> int:
        """Return the most memory that rows take at any time while they grow to these numbers of slots."""
        num_slots = sum(map(capacity_for, sizes))
        return self.slot_bytes * (num_slots + num_slots // _MOST_SPARE)

    def _bucket(self, num_slots: int) -> Bucket:
        """Return the bucket for rows of so many slots."""
        capacity = capacity_for(num_slots)
        return self._buckets.setdefault(capacity, Bucket(capacity))

    def _grow(self, bucket: Bucket, num_rows: int) -> None:
        """Allot memory for so many rows in a bucket."""
        if num_rows > bucket.num_allotted:
            bucket.resize(with_spare(num_rows))

    def _move(self, row: Row, bucket: Bucket) -> None:
        """Move a row into a bucket, with all that it holds."""
        source, index, num_used = row.bucket, row.index, row.num_used
        if source is None:
            bucket.add(row)
            return
        bucket.add(place := Row())
        for layer, (keys, values) in source.layers.items():
            new_keys, new_values = bucket.store(layer, keys[index].transpose(0, 1), values[index].transpose(0, 1))
            new_keys[place.index, :, :num_used] = keys[index, :, :num_used]
            new_values[place.index, :, :num_used] = values[index, :, :num_used]
        source.remove(row)
        bucket.rows[place.index] = row
        row.bucket, row.index = bucket, place.index

    def _trim(self, bucket: Bucket) -> None:
        """Free memory that a bucket's rows no longer need."""
        num_rows = len(bucket.rows)
        if not num_rows:
            self._buckets.pop(bucket.capacity, None)
        elif bucket.num_allotted > num_rows + num_rows // _MOST_SPARE:
            bucket.resize(with_spare(num_rows))

    def _store(self, bucket: Bucket, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._slot_bytes:
            self._slot_bytes[layer] = sum(t.shape[1] * t.shape[2] * t.element_size() for t in (keys, values))
        return bucket.store(layer, keys, values)


class KVRectangle(KVCache):
    """A store whose rows all have the slots of the longest, in memory that moves as seldom as possible.

    For callers that keep addresses, such as CUDA graphs. Memory stays while no row is open, and shrinks in one
    direction only when it has to grow in the other.

    Attributes:
        bucket: All rows.
        version: Changes whenever the memory moves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bucket = self._buckets[0] = Bucket(0)
        self.version = 0

    def shape(self, num_rows: int, num_slots: int) -> None:
        """Make room for so many rows, at least those in use, of so many slots, at least those that any row uses."""
        if num_rows > self.bucket.num_allotted or num_slots > self.bucket.capacity:
            self.version += 1
            self.bucket.resize(num_rows, num_slots)

    @override
    def _bucket(self, num_slots: int) -> Bucket:
        self.shape(len(self.bucket.rows), power_of_two_above(num_slots))
        return self.bucket

    @override
    def _grow(self, bucket: Bucket, num_rows: int) -> None:
        self.shape(num_rows, bucket.capacity)

    @override
    def _move(self, row: Row, bucket: Bucket) -> None:
        if row.bucket is None:
            bucket.add(row)

    @override
    def _trim(self, bucket: Bucket) -> None:
        pass


def capacity_for(num_slots: int) -> int:
    """Return the capacity of the bucket for rows of so many slots: one of a few sizes, most 25 or 50 % apart."""
    if num_slots <= _MIN_CAPACITY:
        return _MIN_CAPACITY
    step = 1 << ((num_slots - 1).bit_length() - (3 if num_slots > _FINE_FROM else 2))
    return -(-num_slots // step) * step


def with_spare(num_rows: int) -> int:
    """Return the number of rows to allot, so that not every new row makes a bucket move."""
    return num_rows + num_rows // (2 * _MOST_SPARE)


def power_of_two_above(count: int) -> int:
    """Return the smallest power of two that is larger than this."""
    return 1 << count.bit_length()


def _resized(old: Tensor, num_rows: int, capacity: int) -> Tensor:
    """Copy (rows, Hkv, slots, D) into this many rows and slots; what is new is zero."""
    if old.shape[0] == num_rows and old.shape[2] == capacity:
        return old
    new = old.new_zeros(num_rows, old.shape[1], capacity, old.shape[3])
    rows, slots = min(old.shape[0], num_rows), min(old.shape[2], capacity)
    new[:rows, :, :slots] = old[:rows, :, :slots]
    return new
