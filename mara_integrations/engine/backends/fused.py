"""The layers of a Llama-shaped decoder written out for the CPU: fewer, wider matrices in the order oneDNN reads them.

Gives the hidden states of the model's own code up to float rounding, in about two thirds of its time for one token and
half for several. Of a model in bfloat16, linear layers are in bfloat16, and all else is in float32. Holds a second copy
of the weights (int8 layers that are not joined are shared), one for all backends of a model, so the model stays as it
is for others who hold it; what they change in it afterwards is not seen here.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, pad, rms_norm
from transformers import PreTrainedModel
from typing_extensions import override

from mara_integrations.engine.backends import attention
from mara_integrations.engine.backends.attention import AttentionSettings, PackedContext
from mara_integrations.engine.backends.forward import weights_version
from mara_integrations.engine.backends.packed import PackedBackend
from mara_integrations.models.int8 import Int8Linear, is_int8, weight_bytes
from mara_integrations.models.memory import free_ram_bytes

# Room left after the copy, as a share of the memory that is free: caches and activations come on top.
_MAX_SHARE_OF_FREE_MEMORY = 0.5
# Rows that oneDNN packs for; with it, linear layers measured faster than plain ones from 1 to 128 rows.
_PACKED_FOR = 16
# With AVX-512 it takes a third longer for 1 or 2 rows than for 4 to 6, which it has kernels for; with AVX2 it does not.
_FEWEST_ROWS = 4 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1

_DECODER_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class FastLinear(Protocol):
    """A linear layer over rows, whose result for a row does not depend on the other rows."""

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in) to (N, out)."""

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The same, added to `residual` (N, out)."""


class PackedLinear(FastLinear):
    """A linear layer with weights in oneDNN's packed order; a row's result does not depend on the other rows.

    Args:
        weight: Shape (out, in), on the CPU, float32 or bfloat16, to which inputs and outputs are rounded then.
        bias: Shape (out,).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _PACKED_FOR)
        self._bias = None if bias is None else bias.detach().to(weight.dtype, copy=True)

    @override
    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self._weight.dtype)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out.float()

    @override
    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        if self._weight.dtype != residual.dtype:
            return residual + self(x)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
        return out


def fast_linear(*linears: nn.Linear | Int8Linear, order: Tensor | None = None) -> FastLinear:
    """Return a fast layer for one linear layer, or for several of a kind that read the same input.

    Args:
        *linears: The layers; their outputs are concatenated.
        order: Order of the concatenated outputs; None leaves them as they are.
    """

    def joined(parts: list[Tensor]) -> Tensor:
        whole = torch.cat(parts)
        return whole if order is None else whole[order]

    first = linears[0]
    if isinstance(first, Int8Linear) and len(linears) == 1 and order is None:
        return first
    weight, bias = joined([linear.weight.detach() for linear in linears]), None
    if any(linear.bias is not None for linear in linears):
        biases = (
            torch.zeros(linear.out_features, dtype=torch.float32) if linear.bias is None else linear.bias.detach()
            for linear in linears
        )
        bias = joined(list(biases))
    scales = [linear.scale for linear in linears if isinstance(linear, Int8Linear)]
    return Int8Linear(weight, joined(scales), bias) if scales else PackedLinear(weight, bias)


@dataclass(frozen=True, slots=True)
class _Norm:
    """Root mean square normalisation."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: _Norm
    query_key_value: FastLinear
    query_norm: _Norm | None
    key_norm: _Norm | None
    output: FastLinear
    mlp_norm: _Norm
    gate_up: FastLinear
    activation: Callable[[Tensor], Tensor]
    down: FastLinear
    settings: AttentionSettings


class FusedDecoder:
    """A decoder's forward over a packed row of tokens.

    Args:
        model: Its decoder must have the parts of Llama and no others; `backend.make_backend` also compares the results.
        settings: Attention settings of each layer.

    Raises:
        ValueError: If the model has another shape, or there is too little memory for the copy.
    """

    def __init__(self, model: PreTrainedModel, settings: Mapping[int, AttentionSettings]) -> None:
        decoder: Any = model.get_decoder()
        _check_shape(decoder)
        _check_memory(decoder)
        self.head_dim: int = decoder.layers[0].self_attn.head_dim
        self.num_heads, self.num_key_heads = (
            getattr(decoder.layers[0].self_attn, name).out_features // self.head_dim for name in ("q_proj", "k_proj")
        )
        self._embeddings: Tensor = decoder.embed_tokens.weight
        self._rotary_embedding = decoder.rotary_emb
        self._rotations = torch.empty(0, 1, self.head_dim // 2, dtype=torch.complex64)
        self._layers = [self._packed(layer, settings[i]) for i, layer in enumerate(decoder.layers)]
        self._norm = _norm(decoder.norm)
        self._fewest_rows = -(-_FEWEST_ROWS // 2) if is_int8(decoder) else _FEWEST_ROWS  # int8 layers make two of each

    def padded(self, x: Tensor) -> Tensor:
        """Append rows of zeros to (N, d) if linear layers are faster with more rows."""
        return pad(x, (0, 0, 0, max(0, self._fewest_rows - len(x))))

    def __call__(self, token_ids: Tensor, positions: Tensor, context: PackedContext) -> Tensor:
        """Return the hidden states after the final norm, (T, d), of token ids and their positions, each (T,)."""
        num_tokens, num_rotated = len(token_ids), self.num_heads + self.num_key_heads
        rotations = self._rotations_at(positions)
        x = self.padded(
            embedding(token_ids, self._embeddings).float()
        )  # (T or more, d); what pads it is seen by no token
        for index, layer in enumerate(self._layers):
            states = layer.query_key_value(layer.attention_norm(x))[:num_tokens].view(num_tokens, -1, self.head_dim)
            rotated = states[:, :num_rotated]
            if layer.query_norm is not None and layer.key_norm is not None:
                normed = layer.query_norm(rotated[:, : self.num_heads]), layer.key_norm(rotated[:, self.num_heads :])
                rotated = torch.cat(normed, dim=1)
            torch.view_as_complex(rotated.unflatten(2, (-1, 2))).mul_(rotations)
            queries, keys = rotated[:, : self.num_heads], rotated[:, self.num_heads :]
            seen = context.attend(index, queries, keys, states[:, num_rotated:], layer.settings)
            x = layer.output.plus(self.padded(seen.reshape(num_tokens, -1)), x)
            gate, up = layer.gate_up(layer.mlp_norm(x)).chunk(2, dim=-1)
            x = layer.down.plus(layer.activation(gate) * up, x)
        return self._norm(x[:num_tokens])

    def _packed(self, layer: Any, settings: AttentionSettings) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        by_pair = torch.arange(self.head_dim).view(2, -1).T.flatten()  # i beside i + D/2: rotated together
        outputs = torch.arange((self.num_heads + 2 * self.num_key_heads) * self.head_dim).view(-1, self.head_dim)
        outputs[: -self.num_key_heads] = outputs[: -self.num_key_heads, by_pair]  # of queries and keys
        query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        return _Layer(
            attention_norm=_norm(layer.input_layernorm),
            query_key_value=fast_linear(attention.q_proj, attention.k_proj, attention.v_proj, order=outputs.flatten()),
            query_norm=_norm(query_norm, by_pair) if query_norm is not None else None,
            key_norm=_norm(key_norm, by_pair) if key_norm is not None else None,
            output=fast_linear(attention.o_proj),
            mlp_norm=_norm(layer.post_attention_layernorm),
            gate_up=fast_linear(mlp.gate_proj, mlp.up_proj),
            activation=mlp.act_fn,
            down=fast_linear(mlp.down_proj),
            settings=settings,
        )

    def _rotations_at(self, positions: Tensor) -> Tensor:
        """Unit complex numbers that rotate pairs at these positions, (T, 1, D/2)."""
        needed, rotations = int(positions.max()) + 1, self._rotations  # backends in other threads may replace the table
        if needed > len(rotations):
            every = torch.arange(max(needed, 2 * len(rotations), 256))[None]
            cos, sin = (table[0, :, None] for table in self._rotary_embedding(self._embeddings[:1].float(), every))
            half = self.head_dim // 2
            rotations = torch.complex(cos[..., :half].contiguous(), sin[..., :half].contiguous())
            self._rotations = rotations
        return rotations[positions]


def _norm(norm: Any, order: Tensor | None = None) -> _Norm:
    weight = norm.weight.detach().float()
    return _Norm(
        weight.clone() if order is None else weight[order], getattr(norm, "variance_epsilon", None) or norm.eps
    )


def _check_shape(decoder: Any) -> None:
    """Refuse a decoder that is not Llama-shaped: an unknown part must not be left out."""
    expected = [(decoder, _DECODER_PARTS)]
    for layer in getattr(decoder, "layers", ()):
        expected += [(layer, _LAYER_PARTS), (getattr(layer, "mlp", None), _MLP_PARTS)]
        attention = getattr(layer, "self_attn", None)
        norms = {"q_norm", "k_norm"} if hasattr(attention, "q_norm") else set()
        expected.append((attention, _ATTENTION_PARTS | norms))
    for module, parts in expected:
        found = {name for name, _ in module.named_children()} if module is not None else set()
        if found != parts:
            raise ValueError(f"{type(module).__name__} has the parts {sorted(found)}, not {sorted(parts)}")
    for name, module in decoder.named_modules():
        if name.endswith("_proj") and type(module) not in (nn.Linear, Int8Linear):
            raise ValueError(f"{name} is a {type(module).__name__}, not a Linear")
        if hasattr(module, "_hf_hook"):
            raise ValueError(f"{name} is moved between devices")
    for name, parameter in decoder.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{name} is {parameter.dtype} on {parameter.device}, not float32 or bfloat16 on the CPU")


def _check_memory(decoder: nn.Module) -> None:
    needed, free = weight_bytes(decoder), free_ram_bytes()
    if free is not None and needed > _MAX_SHARE_OF_FREE_MEMORY * free:
        raise ValueError(f"a copy of the weights takes {needed:,} bytes and {free:,} are free")


@dataclass(frozen=True, eq=False)
class Copy:
    """The second copy of a model's weights, and what it was made of."""

    version: Hashable
    settings: Mapping[int, AttentionSettings]
    decoder: FusedDecoder
    to_logits: Callable[[Tensor], Tensor]


class _Copies:
    """One copy of the weights for each live model, which all its backends share; thread-safe."""

    def __init__(self) -> None:
        self._by_model: weakref.WeakKeyDictionary[PreTrainedModel, Copy] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def of(self, model: PreTrainedModel, to_logits: Callable[[Tensor], Tensor]) -> Copy:
        """Return the copy, made anew where the weights or the attention of the model have changed."""
        version, settings = weights_version(model), attention.read_settings(model)
        with self._lock:
            copy = self._by_model.get(model)
            if copy is None or copy.version != version or copy.settings != settings:
                self._by_model.pop(model, None)  # the old copy is freed first
                decoder = FusedDecoder(model, settings)
                fast = fast_linear(to_logits) if type(to_logits) is nn.Linear else to_logits
                copy = self._by_model[model] = Copy(version, settings, decoder, fast)
            return copy


_copies = _Copies()


class FusedBackend(PackedBackend):
    """The packed backend with the layers of Llama-shaped models written out, on the CPU in float32 or bfloat16.

    Attributes:
        copied: Copy of the model's weights that all its backends share.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.copied = _copies.of(model, self._to_logits)
        self._fused, self._to_logits = self.copied.decoder, self.copied.to_logits

    @override
    def _forward(self, token_ids: Tensor, positions: Tensor, context: attention.PackedContext) -> Tensor:
        return self._fused(token_ids, positions, context)

    @override
    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(self._fused.padded(hidden))[: len(hidden)]
