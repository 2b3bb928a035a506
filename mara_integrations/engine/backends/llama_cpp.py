"""The llama.cpp backend: rows are llama.cpp's sequences, in one cache of keys and values that all of them share."""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from mara_integrations.engine.backends.prefix_cache import Prefix
from mara_integrations.engine.backends.protocol import Backend, Reserve, RowSize, Segment
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.errors import ConfigError, ModelError
from mara_integrations.models.llama_cpp.library import Batch
from mara_integrations.models.llama_cpp.model import LlamaCppModel
from mara_integrations.models.llama_cpp.options import MAX_LIVE, MAX_SEQUENCES, NUM_PREFIXES
from mara_integrations.models.memory import in_mib

# Siblings that a row holds at most. A forward of llama.cpp costs by the token on a CPU, so few are fed together.
_MAX_SIBLINGS = 8
# Tokens of one call; each holds scratch memory of the size of the logits.
_BATCH_TOKENS = 256
# Kept prefixes may hold this share of the cells that rows have, up to some tokens.
_PREFIX_SHARE, _PREFIX_TOKENS = 4, 8192
_NO_ROOM = 1  # returned by `llama_decode` when its cells are full


class _Place(NamedTuple):
    """A token to feed, where, and whether anybody may ask for the logits after it."""

    token_id: int
    position: int
    sequence: int
    is_last: bool = True


@dataclass(eq=False)
class _Row:
    """A sequence of llama.cpp.

    Attributes:
        sequence: Its number.
        length: Committed tokens.
        logits: After the last of them, (V,).
        branches: Sequences of the siblings, each with the logits after it.
    """

    sequence: int
    length: int = 0
    logits: Tensor | None = None
    branches: list[tuple[int, Tensor]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class KeptSequence:
    """A sequence that holds the first tokens of a row; it is given back when this object is dropped."""

    sequence: int
    num_bytes: int


class LlamaCppBackend(Backend):
    """Feeds tokens to a context of llama.cpp, and returns the states and logits that are needed.

    Args:
        model: The loaded file.
        limits: How many rows there may be, and the memory of their keys and values.

    Raises:
        ConfigError: If there may be more rows than llama.cpp has sequences for.
        ModelError: If the context can't be made, or is not what was asked for.
    """

    def __init__(self, model: LlamaCppModel, limits: EngineLimits | None = None) -> None:
        limits = limits or EngineLimits()
        if limits.max_live > MAX_LIVE:
            raise ConfigError(
                f"max_live={limits.max_live} is not allowed: llama.cpp decodes at most {MAX_LIVE} at a time",
                hint="replies above that number wait for their turn",
            )
        self._model, self._library = model, model.library
        self._max_siblings = min(_MAX_SIBLINGS, (MAX_SEQUENCES - NUM_PREFIXES - 1) // limits.max_live - 1)
        num_sequences = limits.max_live * (1 + self._max_siblings) + NUM_PREFIXES + 1
        num_cells, num_kept = _cells(model, limits)
        num_cells += self._max_siblings  # of the longest reply that the context window allows
        self._reserve = Reserve(num_cells * model.cell_bytes, num_kept * model.cell_bytes, NUM_PREFIXES)
        self._context = self._new_context(num_cells + num_kept, num_sequences)
        self._memory = self._library.llama_get_memory(self._context)
        self._batch = _BatchArrays(_BATCH_TOKENS)
        self._rows: dict[int, _Row] = {}
        self._free = list(reversed(range(num_sequences)))
        self._dropped: deque[int] = deque()  # sequences of prefixes that are kept no more; filled in any thread
        self._next_row = 0

    @property
    @override
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    @override
    def reserve(self) -> Reserve:
        return self._reserve

    @override
    def open(self, kept: Any = None, length: int = 0) -> int:
        row = _Row(self._take_sequence())
        if kept is not None and length:
            self._library.llama_memory_seq_cp(self._memory, kept.sequence, row.sequence, 0, length)
            row.length = length
        return self._add(row)

    @override
    def keep(self, row: int, length: int) -> Prefix | None:
        sequence = self._take_sequence()
        self._library.llama_memory_seq_cp(self._memory, self._rows[row].sequence, sequence, 0, length)
        kept = KeptSequence(sequence, length * self._model.cell_bytes)
        weakref.finalize(kept, self._dropped.append, sequence).atexit = False
        return kept

    @override
    def fork(self, row: int) -> int:
        source, sequence = self._rows[row], self._take_sequence()
        self._library.llama_memory_seq_cp(self._memory, source.sequence, sequence, -1, -1)
        return self._add(_Row(sequence, source.length, source.logits))

    @override
    def close(self, row: int) -> None:
        self.drop_siblings(row)
        self._give_back(self._rows.pop(row).sequence)

    @override
    def feed(self, segments: Sequence[Segment]) -> Tensor:
        unseen, seen, branches = self._places(segments)
        try:
            self._decode(unseen, shows=False)
            hidden, logits = self._decode(seen, shows=True)
        except BaseException:
            self._undo(segments, branches)
            raise
        states, place = [], 0
        for segment, own in zip(segments, branches, strict=True):
            row, count = self._rows[segment.row], len(segment.token_ids)
            num_seen = 1 if segment.only_last else count
            states += [hidden.new_zeros(count - num_seen, hidden.shape[1]), hidden[place : place + num_seen]]
            if segment.siblings:
                row.branches += [(sequence, next(logits)) for sequence in own]
            else:
                row.length += count
                row.logits = next(logits)
            place += num_seen
        return torch.cat(states)

    @override
    def commit(self, rows: Sequence[int], branches: Sequence[int]) -> None:
        for handle, branch in zip(rows, branches, strict=True):
            row = self._rows[handle]
            taken, logits = row.branches.pop(branch)
            self._give_back(row.sequence)  # the branch holds all of its tokens too
            row.sequence, row.logits = taken, logits
            row.length += 1
            self.drop_siblings(handle)

    @property
    @override
    def can_retract(self) -> bool:
        return False  # drafts would cost their full price on a CPU

    @property
    @override
    def max_siblings(self) -> int:
        return self._max_siblings

    @override
    def drop_siblings(self, row: int) -> None:
        branches, self._rows[row].branches = self._rows[row].branches, []
        for sequence, _ in branches:
            self._give_back(sequence)

    @override
    def bytes_for(self, sizes: Sequence[RowSize]) -> int:
        return self._model.cell_bytes * sum(size.num_tokens + size.num_siblings for size in sizes)

    @override
    def kept_bytes(self, num_tokens: int) -> int | None:
        return num_tokens * self._model.cell_bytes

    @override
    def logits(self, hidden: Tensor) -> Tensor:
        return self._model.logits(hidden)

    @override
    def next_logits(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        found = [self._rows[row].logits for row in rows]
        return torch.stack([logits for logits in found if logits is not None])

    @override
    def output_embeddings(self, token_ids: Tensor) -> Tensor:
        return self._model.output_embeddings(token_ids)

    # --- sequences

    def _add(self, row: _Row) -> int:
        handle, self._next_row = self._next_row, self._next_row + 1
        self._rows[handle] = row
        return handle

    def _take_sequence(self) -> int:
        while self._dropped:
            self._give_back(self._dropped.popleft())
        if not self._free:
            raise ModelError("llama.cpp has no sequence left", hint="lower max_live")
        return self._free.pop()

    def _give_back(self, sequence: int) -> None:
        self._library.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        self._free.append(sequence)

    @property
    def num_sequences(self) -> int:
        """Sequences that hold rows, siblings or prefixes."""
        while self._dropped:
            self._give_back(self._dropped.popleft())
        return int(self._library.llama_n_seq_max(self._context)) - len(self._free)

    # --- forwards

    def _places(self, segments: Sequence[Segment]) -> tuple[list[_Place], list[_Place], list[list[int]]]:
        """Return the places of tokens without and with a needed output, and the new sequences of siblings."""
        unseen: list[_Place] = []
        seen: list[_Place] = []
        branches: list[list[int]] = []
        for segment in segments:
            row, own = self._rows[segment.row], []
            if segment.siblings:
                for token_id in segment.token_ids:
                    own.append(sequence := self._take_sequence())
                    self._library.llama_memory_seq_cp(self._memory, row.sequence, sequence, -1, -1)
                    seen.append(_Place(token_id, row.length, sequence))
            else:
                last = len(segment.token_ids) - 1
                places = [
                    _Place(token_id, row.length + i, row.sequence, i == last)
                    for i, token_id in enumerate(segment.token_ids)
                ]
                cut = last if segment.only_last else 0
                unseen += places[:cut]
                seen += places[cut:]
            branches.append(own)
        return unseen, seen, branches

    def _decode(self, places: Sequence[_Place], *, shows: bool) -> tuple[Tensor, Iterator[Tensor]]:
        """Feed tokens; returns the states (T, d) where `shows` asks for them, and the logits (V,) after last tokens."""
        hidden = torch.empty(len(places) if shows else 0, self._model.hidden_size)
        logits = []
        self._library.llama_set_embeddings(self._context, shows)
        for start in range(0, len(places), _BATCH_TOKENS):
            chunk = places[start : start + _BATCH_TOKENS]
            answer = self._library.llama_decode(self._context, self._batch.filled(chunk, shows=shows))
            if answer == _NO_ROOM:
                raise ModelError("llama.cpp has no room for more tokens", hint="raise n_ctx, or lower max_live")
            if answer != 0:
                reason = "; ".join(list(self._library.last_words)[-1:])
                raise ModelError(f"llama.cpp can't decode (code {answer}){': ' if reason else ''}{reason}")
            for i, place in enumerate(chunk if shows else ()):
                hidden[start + i] = self._read("llama_get_embeddings_ith", i, self._model.hidden_size)
                if place.is_last:
                    logits.append(self._read("llama_get_logits_ith", i, self._model.vocab_size).clone())
        return hidden, iter(logits)

    def _read(self, name: str, index: int, size: int) -> Tensor:
        """Return numbers in llama.cpp's own memory, (size,); the next forward overwrites them."""
        numbers = getattr(self._library, name)(self._context, index)
        if not numbers:
            raise ModelError(f"{name} of llama.cpp returned nothing for token {index} of a batch")
        return torch.from_numpy(np.ctypeslib.as_array(numbers, (size,)))

    def _undo(self, segments: Sequence[Segment], branches: Sequence[Sequence[int]]) -> None:
        """Take back what a failed forward has written."""
        for segment in segments:
            row = self._rows[segment.row]
            self._library.llama_memory_seq_rm(self._memory, row.sequence, row.length, -1)
        for own in branches:
            for sequence in own:
                self._give_back(sequence)

    def _new_context(self, num_cells: int, num_sequences: int) -> int:
        params = self._library.llama_context_default_params()
        params.n_ctx, params.n_seq_max = num_cells, num_sequences
        params.n_batch = params.n_ubatch = _BATCH_TOKENS
        params.embeddings = params.kv_unified = True
        params.pooling_type = 0  # none: a state for each token
        options = self._model.options
        params.flash_attn_type = -1 if options.flash_attn is None else int(options.flash_attn)
        params.type_k = gguf.GGMLQuantizationType[options.type_k.upper()]
        params.type_v = gguf.GGMLQuantizationType[options.type_v.upper()]
        self._library.last_words.clear()
        context = self._library.llama_init_from_model(self._model.handle, params)
        if not context:
            reason = "; ".join(list(self._library.last_words)[-1:])
            raise ModelError(
                f"llama.cpp can't make a context of {num_cells} tokens, "
                f"{in_mib(num_cells * self._model.cell_bytes)}{': ' if reason else ''}{reason}",
                hint="lower n_ctx, free memory, or set another type_k or type_v",
            )
        weakref.finalize(self, _free, context, self._model).atexit = False  # at the exit, a thread may still use it
        ask = self._library
        got = (ask.llama_n_ctx(context) >= num_cells, ask.llama_n_seq_max(context), ask.llama_pooling_type(context))
        if got != (True, num_sequences, 0) or ask.llama_n_ctx_seq(context) < num_cells:
            raise ModelError(f"the llama.cpp of {ask.source} does not accept the parameters that it was given")
        threads = options.n_threads or torch.get_num_threads()
        ask.llama_set_n_threads(context, threads, threads)
        return int(context)


def _free(context: int, model: LlamaCppModel) -> None:
    """Free a context; its model is an argument so that it is freed later."""
    model.library.llama_free(context)


class _BatchArrays:
    """The memory behind a `Batch`, written anew for each forward."""

    def __init__(self, size: int) -> None:
        self._tokens, self._positions, self._sequences = (np.zeros(size, np.int32) for _ in range(3))
        self._counts, self._shown = np.ones(size, np.int32), np.zeros(size, np.int8)
        first = self._sequences.ctypes.data
        number = ctypes.POINTER(ctypes.c_int32)
        self._pointers = (number * size)(
            *(ctypes.cast(first + i * self._sequences.itemsize, number) for i in range(size))
        )
        self._batch = Batch(
            token=self._tokens.ctypes.data_as(number),
            pos=self._positions.ctypes.data_as(number),
            n_seq_id=self._counts.ctypes.data_as(number),
            seq_id=self._pointers,
            logits=self._shown.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def filled(self, places: Sequence[_Place], *, shows: bool) -> Batch:
        """Return a batch of these tokens; it is valid until the next one."""
        count = len(places)
        self._tokens[:count], self._positions[:count], self._sequences[:count], _ = zip(*places, strict=True)
        self._shown[:count] = shows
        self._batch.n_tokens = count
        return self._batch


def _cells(model: LlamaCppModel, limits: EngineLimits) -> tuple[int, int]:
    """Return the tokens that there is room for, of rows and of kept prefixes."""
    num_cells = model.options.n_ctx or model.window
    if limits.kv_bytes is not None:
        num_cells = min(num_cells, limits.kv_bytes // model.cell_bytes)
    elif model.options.n_ctx is None:
        num_cells = min(num_cells, model.affordable_tokens())  # less than when it was loaded, where others took memory
    num_kept = min(num_cells // _PREFIX_SHARE, _PREFIX_TOKENS)
    if limits.prefix_cache_bytes is not None:
        num_kept = min(limits.prefix_cache_bytes // model.cell_bytes, num_cells)
    return num_cells, num_kept
