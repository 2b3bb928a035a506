"""The forward protocol of gated decoding, and two implementations over transformers.

A backend holds sequences as rows. A *chain* of tokens is appended to a row; *siblings* are branches for its next
position, none of which sees another; one of them is committed, the others are forgotten.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from typing_extensions import override

from mara_integrations import ranks
from mara_integrations.engine import attention
from mara_integrations.engine.cache import KVCache
from mara_integrations.engine.fused import FusedDecoder, fast_linear
from mara_integrations.engine.graphs import ForwardGraphs, Run, cuda_graph
from mara_integrations.engine.hooks import hooks_undone
from mara_integrations.engine.prefix import Prefix
from mara_integrations.engine.windows import has_windows, narrowed
from mara_integrations.errors import ModelError
from mara_integrations.int8 import is_int8

_log = logging.getLogger(__name__)
# What a wrong attention exceeds, and layers that round to 8 bits do not.
_MOST_ROUNDED = 0.25


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
        """Run all segments through the model.

        A chain is part of its row afterwards. Siblings are held, numbered from 0 in feeding order over any number of
        calls, until `commit`.

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


class PackedBackend(Backend):
    """One forward for everything that waits: all segments in one packed row, with our attention and our cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        attention.install(model)
        self._model = model
        self._decoder = _decoder_of(model)
        self._to_logits = _logits_function(model)
        self._cache = KVCache()

    @property
    @override
    def device(self) -> torch.device:
        return _embeddings(self._model).device

    @property
    def num_bytes(self) -> int:
        """Memory held by keys and values."""
        return self._cache.num_bytes

    @override
    def open(self, kept: Any = None, length: int = 0) -> int:
        return self._cache.open(kept, length)

    @override
    def keep(self, row: int, length: int) -> Prefix | None:
        return self._cache.keep(row, length)

    @override
    def fork(self, row: int) -> int:
        length = self._cache.length(row)
        return self._cache.open(self._cache.keep(row, length), length)

    @override
    def close(self, row: int) -> None:
        self._cache.close(row)

    @override
    def feed(self, segments: Sequence[Segment]) -> Tensor:
        layout = [(segment.row, len(segment.token_ids), segment.siblings) for segment in segments]
        context, positions = attention.PackedContext.build(self._cache, layout, self.device)
        token_ids = torch.tensor([t for segment in segments for t in segment.token_ids], device=self.device)  # (T,)
        hidden = self._forward(token_ids, positions, context)
        for row, width, siblings in layout:
            (self._cache.branch if siblings else self._cache.extend)(row, width)
        return hidden

    def _forward(self, token_ids: Tensor, positions: Tensor, context: attention.PackedContext) -> Tensor:
        """Hidden states of a packed row, (T,) to (T, d)."""
        output = self._decoder(input_ids=token_ids[None], **attention.forward_arguments(context, positions))
        return cast(Tensor, output.last_hidden_state[0])

    @override
    def commit(self, rows: Sequence[int], branches: Sequence[int]) -> None:
        self._cache.commit(rows, branches)

    @property
    @override
    def can_retract(self) -> bool:
        return True

    @override
    def retract(self, row: int, count: int, *, held: bool) -> None:
        self._cache.retract(row, count, held)

    @override
    def logits(self, hidden: Tensor) -> Tensor:
        return self._to_logits(hidden)


class FusedBackend(PackedBackend):
    """The packed backend with the layers of Llama-shaped models written out, on the CPU in float32."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._fused = FusedDecoder(model, attention.read_settings(model))
        if type(self._to_logits) is nn.Linear:
            self._to_logits = fast_linear(self._to_logits)

    @override
    def _forward(self, token_ids: Tensor, positions: Tensor, context: attention.PackedContext) -> Tensor:
        return self._fused(token_ids, positions, context)

    @override
    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(self._fused.padded(hidden))[: len(hidden)]


class GraphedBackend(PackedBackend):
    """The packed backend with its forwards captured as CUDA graphs; see `graphs`.

    Args:
        model: On a CUDA device.
        capture: Turns a forward into one that is replayed.
    """

    def __init__(self, model: PreTrainedModel, capture: Callable[[Run], Run] = cuda_graph) -> None:
        super().__init__(model)
        self._cache = KVCache(keep_memory=True)
        self._graphs = ForwardGraphs(self._forward, self._cache, self.device, capture)

    @override
    def feed(self, segments: Sequence[Segment]) -> Tensor:
        hidden = self._graphs.feed(segments)
        if hidden is None:
            return super().feed(segments)
        for segment in segments:
            count = self._cache.branch if segment.siblings else self._cache.extend
            count(segment.row, len(segment.token_ids))
        return hidden


@dataclass(slots=True)
class _SerialRow:
    cache: Any
    length: int = 0
    branches: list[Any] = field(default_factory=list)


class SerialBackend(Backend):
    """One forward a segment, and one a sibling, each from a snapshot of its row's cache.

    Exact for every causal model transformers can run, and slow: for models whose attention takes no trees (position
    biases, recurrent states) and as the oracle of the packed backend.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._decoder = _decoder_of(model)
        self._to_logits = _logits_function(model)
        self._rows: dict[int, _SerialRow] = {}
        self._next_row = 0

    @property
    @override
    def device(self) -> torch.device:
        return _embeddings(self._model).device

    @override
    def keep(self, row: int, length: int) -> Prefix | None:
        return None

    @override
    def open(self, kept: Any = None, length: int = 0) -> int:
        assert kept is None, "this backend keeps no prefixes"
        row, self._next_row = self._next_row, self._next_row + 1
        self._rows[row] = _SerialRow(DynamicCache(config=self._model.config))
        return row

    @override
    def fork(self, row: int) -> int:
        copied, source = self.open(), self._rows[row]
        self._rows[copied] = _SerialRow(_snapshot(source.cache), source.length)
        return copied

    @override
    def close(self, row: int) -> None:
        del self._rows[row]

    @override
    def feed(self, segments: Sequence[Segment]) -> Tensor:
        hidden = []
        for segment in segments:
            row = self._rows[segment.row]
            if segment.siblings:
                for token_id in segment.token_ids:
                    branch = _snapshot(row.cache)
                    hidden.append(self._run(branch, [token_id], row.length))
                    row.branches.append(branch)
            else:
                hidden.append(self._run(row.cache, segment.token_ids, row.length))
                row.length += len(segment.token_ids)
        return torch.cat(hidden)

    @override
    def commit(self, rows: Sequence[int], branches: Sequence[int]) -> None:
        for handle, branch in zip(rows, branches, strict=True):
            row = self._rows[handle]
            row.cache, row.branches = row.branches[branch], []
            row.length += 1

    @property
    @override
    def can_retract(self) -> bool:
        return False  # not every kind of state can be cut

    @override
    def retract(self, row: int, count: int, *, held: bool) -> None:
        raise AssertionError("ask can_retract first")

    @override
    def logits(self, hidden: Tensor) -> Tensor:
        return self._to_logits(hidden)

    def _run(self, cache: Any, token_ids: Sequence[int], start: int) -> Tensor:
        ids = torch.tensor([token_ids], device=self.device)
        positions = torch.arange(start, start + len(token_ids), device=self.device)[None]
        arguments: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
        if _takes_position_ids(self._decoder):
            arguments["position_ids"] = positions
        hidden: Tensor = self._decoder(**arguments).last_hidden_state[0]
        return hidden.to(self.device)  # of a model spread over devices, the last one's


def make_backend(model: PreTrainedModel, name: str = "the model") -> Backend:
    """The fastest backend that a probe shows to compute what the model computes: fused, packed or, slow, serial.

    Raises:
        ModelError: If not even the serial one does: the model is not a causal language model we can drive.
    """
    if any(map(ranks.is_spread, model.parameters())):
        raise ModelError(
            f"{name} ({type(model).__name__}) is spread over processes that do not follow this one",
            hint="give its name and model_kwargs={'tp_plan': 'auto'} in place of the loaded model",
        )
    reason = why_not_packed(model)
    if not reason:
        fast = GraphedBackend if model.device.type == "cuda" else FusedBackend
        for kind in (fast, PackedBackend):
            packed, reason = probed(kind, model)
            if packed is not None:
                return packed
            _log.info("%s (%s) does not run on %s: %s", name, type(model).__name__, kind.__name__, reason)
    attention.uninstall(model)
    warnings.warn(f"{name} ({type(model).__name__}) runs on the slow serial path: {reason}", stacklevel=2)
    serial, reason = probed(SerialBackend, model)
    if serial is None:
        raise ModelError(
            f"{name} ({type(model).__name__}) can't be decoded exactly: {reason}",
            hint=f"models of attention layers can; a newer transformers than {transformers.__version__} may know how",
        )
    return serial


def why_not_packed(model: PreTrainedModel) -> str:
    """Why a model can't be decoded packed, as far as can be told without trying, or ''."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return "its position encoding depends on the longest sequence in the batch"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention can't be replaced"
    if has_windows(model) and (difference := _window_difference(model)):
        return f"its windows are not those of packed attention: {difference}"
    return ""


def _window_difference(model: PreTrainedModel) -> str:
    with narrowed(model):
        return probed(PackedBackend, model)[1]


def probed(kind: Callable[[PreTrainedModel], Backend], model: PreTrainedModel) -> tuple[Backend | None, str]:
    """A backend that computes what its model computes, or None and why not."""
    try:
        backend = kind(model)
        difference = _probe(backend, model)
    except Exception as error:  # a model outside the contract may fail in any way; the reason is passed on in words
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
    return (None, difference) if difference else (backend, "")


def _probe(backend: Backend, model: PreTrainedModel) -> str:
    """Compare a chain and three siblings with plain forwards of the whole sequence; returns what differs, or ''."""
    if isinstance(backend, PackedBackend) and not _asks_for_attention(backend):
        return "its layers do not ask for an attention function"
    tolerance = 2e-3 if next(model.parameters()).dtype == torch.float32 else 6e-2
    if is_int8(model):  # inputs are rounded, last digits that differ maybe apart: 5e-4 in 30 layers, 3e-6 in float32
        tolerance = 2e-2
    elif getattr(model, "is_quantized", False):  # layers that round states: by the last digit, and by what else is fed
        rounding = max(_gaps(SerialBackend(model), model).values())
        tolerance = max(tolerance, min(4 * rounding, _MOST_ROUNDED))
    for what, gap in _gaps(backend, model).items():
        if not gap < tolerance:
            return f"{what} differ from a plain forward by {gap:.2g} of their size"
    return ""


@torch.inference_mode()
def _asks_for_attention(backend: PackedBackend) -> bool:
    row = backend.open()
    try:
        backend.feed([Segment(row, [0])])
        return backend.num_bytes > 0
    finally:
        backend.close(row)


@torch.inference_mode()
def _gaps(backend: Backend, model: PreTrainedModel) -> dict[str, float]:
    """How far a backend's numbers lie from those of plain forwards, as a share of their size."""
    prompt = torch.randint(len(_embeddings(model)), (9,), generator=torch.Generator().manual_seed(0)).tolist()
    row = backend.open()
    try:
        chain = backend.feed([Segment(row, prompt[:4])])
        siblings = backend.feed([Segment(row, prompt[4:7], siblings=True)])
        backend.commit([row], [1])
        after = backend.feed([Segment(row, prompt[7:])])
        got = torch.cat([chain, siblings, after])
        logits = backend.logits(got)
    finally:
        backend.close(row)
    kept = [*prompt[:4], prompt[5], *prompt[7:]]
    inputs = [kept, [*prompt[:4], prompt[4]], [*prompt[:4], prompt[6]]]
    with hooks_undone(model):
        outputs = [
            model(input_ids=torch.tensor([ids], device=backend.device), output_hidden_states=True, use_cache=False)
            for ids in inputs
        ]
    take = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 4), (0, 4), (2, 4), (0, 5), (0, 6)]  # (input, place) of each token fed
    want_hidden = torch.stack([outputs[i].hidden_states[-1][0, place] for i, place in take])
    want_logits = torch.stack([outputs[i].logits[0, place] for i, place in take])
    return {"hidden states": _gap(got, want_hidden), "logits": _gap(logits, want_logits)}


def _gap(mine: Tensor, theirs: Tensor) -> float:
    mine, theirs = mine.float(), theirs.float()
    return float((mine - theirs).norm() / theirs.norm().clamp_min(1e-6))


def _decoder_of(model: PreTrainedModel) -> Any:
    decoder = model.get_decoder()
    return model.model if decoder is model else decoder  # Llama 4 finds only itself


def _embeddings(model: PreTrainedModel) -> Tensor:
    return cast(Tensor, model.get_input_embeddings().weight)


def _logits_function(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """`lm_head` alone where that is all there is, else the model's own code after its decoder (soft caps, scalings)."""
    lm_head, embeddings = model.get_output_embeddings(), _embeddings(model)
    probe = torch.arange(len(embeddings), device=embeddings.device)[None, -5:]
    with torch.inference_mode(), hooks_undone(model):
        output = model(input_ids=probe, output_hidden_states=True, use_cache=False)
        hidden, want = output.hidden_states[-1][0], output.logits[0]
        if lm_head is not None and torch.allclose(lm_head(hidden).float(), want.float(), rtol=1e-3, atol=1e-3):
            return cast(Callable[[Tensor], Tensor], lm_head)
    decoder, tail = _decoder_of(model), copy.copy(model)
    tail._modules = dict(model._modules)  # a shallow copy: the user's model keeps its decoder, the weights are shared
    for name, child in model.named_children():
        if any(module is decoder for module in child.modules()):
            tail._modules[name] = _Finished(decoder)

    def to_logits(hidden: Tensor) -> Tensor:
        logits: Tensor = tail(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits

    return to_logits


class _Finished(nn.Module):
    """Stands where a decoder stood and hands its input on as the decoder's result."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.config = decoder.config

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


def _snapshot(cache: Any) -> Any:
    """A cache that can grow without changing the one it came from."""
    if all(type(layer) is DynamicLayer for layer in cache.layers):  # update() makes new tensors: sharing is safe
        branch = copy.copy(cache)
        branch.layers = [copy.copy(layer) for layer in cache.layers]
        return branch
    return copy.deepcopy(cache)


def _takes_position_ids(decoder: nn.Module) -> bool:
    import inspect

    parameters = inspect.signature(decoder.forward).parameters
    return "position_ids" in parameters
