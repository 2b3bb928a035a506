"""Attention over a packed row of tokens from many sequences; each sees its own prefix and, among siblings, itself only.

Registered once with transformers under a name of its own; without our context it falls through to what the model used
before, so a model we serve still works for everybody else who holds it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mara_integrations.engine.backends.kv_cache import KVCache

_PREFIX = "mara_"
_CONTEXT = "mara_context"


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """What a model asks of the attention of one layer.

    Attributes:
        scaling: Of the scores; None is 1 / sqrt(D).
        sliding_window: How many tokens back one looks, itself included; None is all.
        softcap: Bound of the scores.
        sinks: A score a head that takes weight and gives nothing, (H,).
    """

    scaling: float | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(slots=True)
class _Group:
    """Segments of one width: n sequences, w tokens each."""

    rows: Tensor | slice  # (n,) rows of the cache; a slice when they are all of it
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
class PackedContext:
    """What one packed forward has to know; travels to the attention function as a keyword argument.

    Attributes:
        cache: Where keys and values are.
        rows: Row of the cache for each token, shape (T,).
        slots: Slot for each token, shape (T,).
        groups: The segments, by width.
    """

    cache: KVCache
    rows: Tensor
    slots: Tensor
    groups: list[_Group]

    @classmethod
    def build(
        cls, cache: KVCache, segments: Sequence[tuple[int, int, bool]], device: torch.device
    ) -> tuple[PackedContext, Tensor]:
        """Lay out segments given as (handle, width, siblings), before the cache counts them.

        Returns:
            The context, and the position of each token, shape (T,).
        """
        rows: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        by_width: dict[int, list[tuple[int, int, int, int, bool]]] = {}
        for handle, width, siblings in segments:
            row, start = cache.row(handle), cache.length(handle)
            first = start + cache.branches(handle)
            by_width.setdefault(width, []).append((row, len(rows), start, first, siblings))
            rows += [row] * width
            slots += range(first, first + width)
            positions += [start] * width if siblings else range(start, start + width)
        cache.reserve(max(slots) + 1)
        groups = [
            cls._group(width, run, len(rows), device)
            for width, members in by_width.items()
            for run in _runs(sorted(members), device)
        ]
        return (
            cls(cache, torch.tensor(rows, device=device), torch.tensor(slots, device=device), groups),
            torch.tensor(positions, device=device),
        )

    @classmethod
    def rectangle(
        cls, cache: KVCache, shape: tuple[int, int, int], slots: Tensor, starts: Tensor, siblings: Tensor
    ) -> PackedContext:
        """Rows 0 to n - 1 of the cache with w tokens each: all that may change from step to step is in tensors.

        Args:
            cache: Has room for them.
            shape: (n, w, number of slots that are looked at).
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
        return cls(cache, rows, slots, [group])

    @staticmethod
    def _group(w: int, members: list[tuple[int, int, int, int, bool]], total: int, device: torch.device) -> _Group:
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

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, settings: AttentionSettings) -> Tensor:
        """Store keys and values (T, Hkv, D), then let queries (T, H, D) look; returns (T, H, D)."""
        stored_keys, stored_values = self.cache.write(layer, self.rows, self.slots, keys, values)
        out = queries.new_empty(*queries.shape[:2], values.shape[-1]) if len(self.groups) > 1 else queries
        for group in self.groups:
            q = queries if group.tokens is None else queries[group.tokens]
            q = q.unflatten(0, (group.n, group.w))  # (n, w, H, D)
            k = stored_keys[group.rows, :, : group.num_slots]
            v = stored_values[group.rows, :, : group.num_slots]
            window = settings.sliding_window
            mask = group.mask(window, queries.dtype)
            if settings.softcap is not None or settings.sinks is not None:
                result = _explicit_attention(q, k, v, mask, settings)
            elif group.is_causal and (window is None or group.num_slots <= window):
                result = scaled_dot_product_attention(
                    q.transpose(1, 2), k, v, is_causal=True, scale=settings.scaling, enable_gqa=True
                ).transpose(1, 2)
            else:
                result = _grouped_attention(q, k, v, mask, settings.scaling)
            result = result.flatten(0, 1)  # (n * w, H, D)
            if group.tokens is None:
                out = result
            else:
                out[group.tokens] = result
        return out


def _runs(
    members: list[tuple[int, int, int, int, bool]], device: torch.device
) -> Iterator[list[tuple[int, int, int, int, bool]]]:
    """Members of a group in sorted order, cut so that each run's rows of the cache are a slice, which is read in place.

    An accelerator copies the rows sooner than it would start another kernel.
    """
    start = 0
    for end in range(1, len(members) + 1):
        if end == len(members) or (device.type == "cpu" and members[end][0] != members[end - 1][0] + 1):
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
    """Give a model its own attention back."""
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
    """Stands where a `PackedContext` stands and notes what each layer asks for."""

    def __init__(self) -> None:
        self.settings: dict[int, AttentionSettings] = {}

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, settings: AttentionSettings) -> Tensor:
        self.settings[layer] = settings
        return torch.zeros(*queries.shape[:2], values.shape[-1], dtype=queries.dtype, device=queries.device)


@torch.inference_mode()
def read_settings(model: PreTrainedModel) -> dict[int, AttentionSettings]:
    """What each layer of a model that `install` has prepared asks of attention, as it says itself when it runs."""
    recorder = _Recorder()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model.get_decoder()(input_ids=token, **forward_arguments(recorder, token[0]))
    return recorder.settings


def forward_arguments(context: PackedContext | _Recorder, position_ids: Tensor) -> dict[str, Any]:
    """Keyword arguments of one packed forward, for the decoder of a model that `install` has prepared.

    A 4D mask is passed through unread: it keeps transformers from building its own, and from taking sibling positions
    for packed training documents.
    """
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=position_ids.device)
    return {"attention_mask": mask, "position_ids": position_ids[None], "use_cache": False, _CONTEXT: context}
