"""Attention over a packed row of tokens from many sequences; each sees its own prefix and, among siblings, itself only.

Registered once with transformers under a name of its own; without our context it falls through to what the model used
before, so a model we serve still works for everybody else who holds it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mara_integrations.engine.backends.kv_cache import Bucket, KVCache, KVRectangle

_PREFIX = "mara_"
_CONTEXT = "mara_context"


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """The attention settings of one layer.

    Attributes:
        scaling: Factor of the scores; None is 1 / sqrt(D).
        sliding_window: Latest tokens that a token attends to, itself included; None is all.
        softcap: Bound of the scores.
        sinks: One score per attention head that takes weight and adds no value, (H,).
    """

    scaling: float | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(slots=True)
class _Group:
    """Segments of one width: n sequences, w tokens each."""

    rows: Tensor | slice  # (n,) rows of the bucket; a slice when they are all of it
    tokens: Tensor | None  # (n * w,) places in the packed row; None when it is the whole row in order
    n: int
    w: int
    start: Tensor  # (n, 1, 1) committed tokens
    own: Tensor  # (n, w, 1) slot of each token
    siblings: Tensor  # (n, 1, 1)
    num_slots: int  # the furthest slot any of them sees, plus one
    sees_all: bool  # single tokens, each seeing every slot up to num_slots
    is_causal: bool  # one whole prompt from slot 0
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """0 where a token may look and -inf elsewhere, (n, 1, w, num_slots); None: everywhere."""
        if window is not None and window >= self.num_slots:
            window = None
        if window not in self.masks:
            self.masks[window] = self._mask(window, dtype)
        return self.masks[window]

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        if window is None and self.sees_all:
            return None
        slots = torch.arange(self.num_slots, device=self.own.device)
        visible = torch.where(self.siblings, (slots < self.start) | (slots == self.own), slots <= self.own)
        if window is not None:
            position = torch.where(self.siblings, self.start, self.own)
            visible &= slots > position - window
        mask = torch.zeros(
            visible.shape, dtype=dtype, device=visible.device
        )  # a boolean one is made to this each layer
        return mask.masked_fill_(~visible, -torch.inf)[:, None]


@dataclass(slots=True)
class _Part:
    """The tokens of a packed row whose sequences are in one bucket of the cache."""

    bucket: Bucket
    tokens: Tensor | None  # (t,) their places in the packed row; None when they are all of it
    rows: Tensor  # (t,) row of each token in the bucket
    slots: Tensor  # (t,) slot of each token
    groups: list[_Group]  # by width; places count from the start of the packed row


class _Placed(NamedTuple):
    """A segment and where it is: in the packed row from `offset` on, in its row of the bucket from slot `first` on."""

    row: int
    offset: int
    start: int  # committed tokens
    first: int
    siblings: bool


@dataclass(slots=True)
class PackedContext:
    """The layout of one packed forward; passed to the attention function as a keyword argument.

    Attributes:
        cache: Where keys and values are.
        parts: The tokens, by bucket of the cache.
    """

    cache: KVCache
    parts: list[_Part]

    @classmethod
    def build(
        cls, cache: KVCache, segments: Sequence[tuple[int, int, bool]], device: torch.device
    ) -> tuple[PackedContext, Tensor]:
        """Lay out segments given as (handle, width, siblings), before the cache counts them.

        Returns:
            The context, and the position of each token, shape (T,).
        """
        cache.reserve({handle: cache.row(handle).num_used + width for handle, width, _ in segments})
        positions: list[int] = []
        by_bucket: dict[Bucket, dict[int, list[_Placed]]] = {}  # then by width
        for handle, width, siblings in segments:
            row = cache.row(handle)
            assert row.bucket is not None, "it was reserved"
            placed = _Placed(row.index, len(positions), row.length, row.num_used, siblings)
            by_bucket.setdefault(row.bucket, {}).setdefault(width, []).append(placed)
            positions += [row.length] * width if siblings else range(row.length, row.length + width)
        parts = [cls._part(bucket, members, len(positions), device) for bucket, members in by_bucket.items()]
        return cls(cache, parts), torch.tensor(positions, device=device)

    @staticmethod
    def _part(bucket: Bucket, by_width: dict[int, list[_Placed]], total: int, device: torch.device) -> _Part:
        tokens: list[int] = []
        rows: list[int] = []
        slots: list[int] = []
        for width, members in by_width.items():
            for placed in members:
                tokens += range(placed.offset, placed.offset + width)
                rows += [placed.row] * width
                slots += range(placed.first, placed.first + width)
        groups = [
            _group(width, run, total, device)
            for width, members in by_width.items()
            for run in _runs(sorted(members), device)
        ]
        is_whole = tokens == list(range(total))
        return _Part(
            bucket,
            None if is_whole else torch.tensor(tokens, device=device),
            torch.tensor(rows, device=device),
            torch.tensor(slots, device=device),
            groups,
        )

    @classmethod
    def rectangle(
        cls, cache: KVRectangle, shape: tuple[int, int, int], slots: Tensor, starts: Tensor, siblings: Tensor
    ) -> PackedContext:
        """Lay out rows 0 to n - 1 of the cache with w tokens each. All that changes from step to step is in tensors.

        Args:
            cache: Has room for them.
            shape: (n, w, number of slots attended to).
            slots: Slot of each token, (n * w,).
            starts: Committed tokens of each row, (n,).
            siblings: Whether its tokens are siblings, (n,).
        """
        n, w, num_slots = shape
        group = _Group(
            rows=slice(0, n),
            tokens=None,
            n=n,
            w=w,
            start=starts[:, None, None],
            own=slots.view(n, w, 1),
            siblings=siblings[:, None, None],
            num_slots=num_slots,
            sees_all=False,
            is_causal=False,
        )
        rows = torch.arange(n, device=slots.device).repeat_interleave(w)
        return cls(cache, [_Part(cache.bucket, None, rows, slots, [group])])

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, settings: AttentionSettings) -> Tensor:
        """Store keys and values, (T, Hkv, D), and return the attention output of the queries, (T, H, D)."""
        out: Tensor | None = None
        for part in self.parts:
            new = (keys, values) if part.tokens is None else (keys[part.tokens], values[part.tokens])
            stored_keys, stored_values = self.cache.write(layer, part.bucket, part.rows, part.slots, *new)
            for group in part.groups:
                q = queries if group.tokens is None else queries[group.tokens]
                q = q.unflatten(0, (group.n, group.w))  # (n, w, H, D)
                k = stored_keys[group.rows, :, : group.num_slots]
                v = stored_values[group.rows, :, : group.num_slots]
                result = _attention(q, k, v, group, settings).flatten(0, 1)  # (n * w, H, D)
                if group.tokens is None:
                    return result
                if out is None:
                    out = queries.new_empty(*queries.shape[:2], values.shape[-1])
                out[group.tokens] = result
        assert out is not None, "there is something to feed"
        return out


def _group(w: int, members: list[_Placed], total: int, device: torch.device) -> _Group:
    """Make a group of segments of one width, in the order of their rows."""
    rows, offsets, starts, firsts, siblings = map(list, zip(*members, strict=True))
    n = len(members)
    contiguous = rows == list(range(rows[0], rows[0] + n))
    within = torch.arange(w, device=device)
    tokens = (torch.tensor(offsets, device=device)[:, None] + within).flatten()
    in_order = n * w == total and offsets == sorted(offsets)
    return _Group(
        rows=slice(rows[0], rows[0] + n) if contiguous else torch.tensor(rows, device=device),
        tokens=None if in_order else tokens,
        n=n,
        w=w,
        start=torch.tensor(starts, device=device)[:, None, None],
        own=(torch.tensor(firsts, device=device)[:, None] + within)[:, :, None],
        siblings=torch.tensor(siblings, device=device)[:, None, None],
        num_slots=max(firsts) + w,
        sees_all=w == 1 and min(firsts) == max(firsts) and firsts == starts,
        is_causal=n == 1 and w > 1 and firsts == [0] and not siblings[0],
    )


def _attention(q: Tensor, k: Tensor, v: Tensor, group: _Group, settings: AttentionSettings) -> Tensor:
    """Attention of a group's queries (n, w, H, D) over its rows' keys and values (n, Hkv, S, D): (n, w, H, D)."""
    window = settings.sliding_window
    if settings.softcap is not None or settings.sinks is not None:
        return _explicit_attention(q, k, v, group.mask(window, q.dtype), settings)
    if group.is_causal and (window is None or group.num_slots <= window):
        return scaled_dot_product_attention(
            q.transpose(1, 2), k, v, is_causal=True, scale=settings.scaling, enable_gqa=True
        ).transpose(1, 2)
    return _grouped_attention(q, k, v, group.mask(window, q.dtype), settings.scaling)


def _runs(members: list[_Placed], device: torch.device) -> Iterator[list[_Placed]]:
    """Members of a group in sorted order, cut so that each run's rows of the cache are a slice, which is read in place.

    An accelerator copies the rows sooner than it would start another kernel.
    """
    start = 0
    for end in range(1, len(members) + 1):
        if end == len(members) or (device.type == "cpu" and members[end].row != members[end - 1].row + 1):
            yield members[start:end]
            start = end


def _grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attention with fewer key heads than query heads, folded into the query length: no copy of keys and values.

    Queries (n, w, H, D) to outputs (n, w, H, D).
    """
    w, num_key_heads = q.shape[1], k.shape[1]
    groups = q.shape[2] // num_key_heads
    q = q.unflatten(2, (num_key_heads, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (n, Hkv, G * w, D)
    if mask is not None and groups > 1:
        mask = mask[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)  # (n, 1, G * w, S)
    out: Tensor = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    out = out.unflatten(2, (groups, w)).permute(0, 3, 1, 2, 4)  # (n, w, Hkv, G, D)
    return out.flatten(2, 3)


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, settings: AttentionSettings) -> Tensor:
    """Attention with a soft cap on the scores (Gemma 2) or a sink a head (GPT-OSS), which no fused kernel has."""
    q = q.transpose(1, 2)  # (n, H, w, D)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * (settings.scaling if settings.scaling is not None else q.shape[-1] ** -0.5)
    if settings.softcap is not None:
        scores = torch.tanh(scores / settings.softcap) * settings.softcap
    if mask is not None:
        scores = scores + mask
    scores = scores.float()
    if settings.sinks is not None:
        sink = settings.sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights.to(q.dtype) @ v).transpose(1, 2)


def install(model: PreTrainedModel) -> None:
    """Route a model's attention through `packed_attention`; idempotent."""
    previous = model.config._attn_implementation or "eager"
    if previous.startswith(_PREFIX):
        return
    name = _PREFIX + previous
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, packed_attention)
        if (
            previous in ALL_MASK_ATTENTION_FUNCTIONS
        ):  # for calls without our context; ours bring a mask that is not read
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[previous])
    model.set_attn_implementation(name)


def uninstall(model: PreTrainedModel) -> None:
    """Restore a model's own attention."""
    name = model.config._attn_implementation or ""
    if name.startswith(_PREFIX):
        model.set_attn_implementation(name.removeprefix(_PREFIX))


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The function transformers calls in every attention layer."""
    context: PackedContext | _Recorder | None = kwargs.pop(_CONTEXT, None)
    if context is None:
        name = cast(Any, module.config)._attn_implementation.removeprefix(_PREFIX)
        if name == "eager":
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = ALL_ATTENTION_FUNCTIONS[name]
        result: tuple[Tensor, Tensor | None] = function(module, query, key, value, attention_mask, **kwargs)
        return result
    settings = AttentionSettings(
        kwargs.get("scaling"), kwargs.get("sliding_window"), kwargs.get("softcap"), kwargs.get("s_aux")
    )
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))  # (T, H, D)
    layer: int = module.layer_idx  # type: ignore[assignment]  # every decoder's attention has one
    return context.attend(layer, queries, keys, values, settings)[None], None


class _Recorder:
    """Takes the place of a `PackedContext` and records the attention settings of each layer."""

    def __init__(self) -> None:
        self.settings: dict[int, AttentionSettings] = {}

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, settings: AttentionSettings) -> Tensor:
        self.settings[layer] = settings
        return torch.zeros(*queries.shape[:2], values.shape[-1], dtype=queries.dtype, device=queries.device)


@torch.inference_mode()
def read_settings(model: PreTrainedModel) -> dict[int, AttentionSettings]:
    """Return the attention settings of each layer, recorded in a forward of a model that `install` has prepared."""
    recorder = _Recorder()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model.get_decoder()(input_ids=token, **forward_arguments(recorder, token[0]))
    return recorder.settings


def forward_arguments(context: PackedContext | _Recorder, position_ids: Tensor) -> dict[str, Any]:
    """Return the keyword arguments of one packed forward, for the decoder of a model that `install` has prepared.

    A 4D mask is passed through unread: it keeps transformers from building its own, and from taking sibling positions
    for packed training documents.
    """
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=position_ids.device)
    return {"attention_mask": mask, "position_ids": position_ids[None], "use_cache": False, _CONTEXT: context}
