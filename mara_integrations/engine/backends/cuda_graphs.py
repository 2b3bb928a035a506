"""CUDA graphs of the packed forward: a step costs one launch instead of thousands.

A graph runs on fixed shapes and addresses, so a step's segments are laid out as a rectangle, rows of the cache by
tokens a row, rounded up to a few sizes; what pads it is written to a slot that no token sees. Wide steps, as those of
long prompts, are not for graphs: there the arithmetic hides the launches.

Experimental, and off unless `MARA_EXPERIMENTAL` names `cuda-graphs`: no GPU has run it so far. The layout is tested on
the CPU, with the capture replaced by a plain call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from mara_integrations.engine.backends.attention import PackedContext
from mara_integrations.engine.backends.kv_cache import KVRectangle, power_of_two_above
from mara_integrations.engine.backends.packed import PackedBackend
from mara_integrations.engine.backends.protocol import RowSize, Segment

Run: TypeAlias = Callable[[], Tensor]
Forward: TypeAlias = Callable[[Tensor, Tensor, PackedContext], Tensor]

# Below some 200 tokens a forward of a large model is bound by reading its weights, so padding up to here costs little.
_MAX_TOKENS = 256
_ROWS, _WIDTHS = (1, 2, 4, 8, 16, 32, 64), (1, 4, 16, 48)
_MIN_SLOTS = 256


def cuda_graph(run: Run) -> Run:
    """Capture the device work of a function; calling the result replays it into the same output tensors.

    Source: the usage of `torch.cuda.CUDAGraph` in PyTorch's notes on CUDA semantics: warm up on a side stream, capture.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may put heads on the device
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


class ForwardGraphs:
    """Forwards of one model over one cache, each captured when its size first occurs.

    Args:
        forward: Maps the tokens of a packed row, their positions, each (T,), and the context to hidden states (T, d).
        cache: Keys and values. A graph writes to the addresses that it was captured with.
        device: Device of both.
        capture: See `cuda_graph`.
    """

    def __init__(
        self, forward: Forward, cache: KVRectangle, device: torch.device, capture: Callable[[Run], Run]
    ) -> None:
        self._forward = forward
        self._cache = cache
        self._device = device
        self._capture = capture
        self._graphs: dict[tuple[int, int, int], tuple[Tensor, Run]] = {}
        self._store_version = -1

    def feed(self, segments: Sequence[Segment]) -> Tensor | None:
        """Return the hidden states of all tokens in order, (T, d); None if the segments are too wide for a graph."""
        cache = self._cache
        n = _round_up(cache.num_open, _ROWS)
        w = _round_up(max(len(segment.token_ids) for segment in segments), _WIDTHS)
        if n is None or w is None or n * w > _MAX_TOKENS:
            return None
        ends = {s.row: cache.row(s.row).num_used + len(s.token_ids) for s in segments}
        num_slots = _round_slots(max(cache.most_used, *ends.values()))  # padding is written to idle rows too
        cache.shape(n, num_slots)
        cache.reserve(ends)
        inputs, places = self._lay_out(segments, n, w, num_slots - 1)
        hidden = self._run(n, w, num_slots, inputs)
        return hidden[torch.tensor(places, device=self._device)]  # a copy: the next replay writes over it

    def _lay_out(self, segments: Sequence[Segment], n: int, w: int, unseen: int) -> tuple[list[int], list[int]]:
        """Return the arguments of `_run`, and where in the rectangle the tokens are; padding goes to slot `unseen`."""
        token_ids, positions, slots = [0] * (n * w), [0] * (n * w), [unseen] * (n * w)
        starts, siblings = [0] * n, [1] * n
        places = []
        for segment in segments:
            row = self._cache.row(segment.row)
            starts[row.index], siblings[row.index] = row.length, int(segment.siblings)
            for index, token_id in enumerate(segment.token_ids):
                place = row.index * w + index
                token_ids[place] = token_id
                positions[place] = row.length + (0 if segment.siblings else index)
                slots[place] = row.num_used + index
                places.append(place)
        return [*token_ids, *positions, *slots, *starts, *siblings], places

    def _run(self, n: int, w: int, num_slots: int, inputs: list[int]) -> Tensor:
        if self._store_version != self._cache.version:  # it was moved: the graphs write to where it was
            self._graphs.clear()
            self._store_version = self._cache.version
        given = torch.tensor(inputs)
        if (n, w, num_slots) not in self._graphs:
            buffer = given.to(self._device, copy=True)
            token_ids, positions, slots, starts, siblings = buffer.split([n * w] * 3 + [n] * 2)

            def run() -> Tensor:
                context = PackedContext.rectangle(self._cache, (n, w, num_slots), slots, starts, siblings.bool())
                return self._forward(token_ids, positions, context)

            self._graphs[n, w, num_slots] = buffer, self._capture(run)
        buffer, replay = self._graphs[n, w, num_slots]
        buffer.copy_(given)
        return replay()


def _round_slots(num_used: int) -> int:
    """Slots of a rectangle whose longest row uses so many: one more at least, which no token sees."""
    return max(_MIN_SLOTS, power_of_two_above(num_used))


def _round_up(count: int, sizes: Sequence[int]) -> int | None:
    return next((size for size in sizes if size >= count), None)


class GraphedBackend(PackedBackend):
    """The packed backend with its forwards captured as CUDA graphs; see `ForwardGraphs`.

    Args:
        model: A model on a CUDA device.
        capture: Turns a forward into a replayed one.
    """

    def __init__(self, model: PreTrainedModel, capture: Callable[[Run], Run] = cuda_graph) -> None:
        super().__init__(model)
        self._cache: KVRectangle = KVRectangle()
        self._graphs = ForwardGraphs(self._forward, self._cache, self.device, capture)

    @override
    def bytes_for(self, sizes: Sequence[RowSize]) -> int:
        num_slots = _round_slots(max((size.num_tokens + size.num_siblings for size in sizes), default=0))
        num_rows = _round_up(len(sizes), _ROWS) or len(sizes)
        return num_rows * num_slots * self._cache.slot_bytes

    @override
    def feed(self, segments: Sequence[Segment]) -> Tensor:
        hidden = self._graphs.feed(segments)
        if hidden is None:
            return super().feed(segments)
        for segment in segments:
            count = self._cache.hold if segment.siblings else self._cache.extend
            count(segment.row, len(segment.token_ids))
        return hidden
