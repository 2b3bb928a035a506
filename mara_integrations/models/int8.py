"""Linear layers with int8 weights on the CPU, by torch's own oneDNN kernels.

A weight has one scale an output, found once; an input has one scale a row, found when it arrives. An input keeps 16
bits, as a coarse and a fine byte that are multiplied in one go. The coarse byte alone would take as long for few rows,
and two thirds as long for many, but rounding would decide results: a model's states differed by 9 % between two batch
layouts, where they now differ by 0.05 %. Sums are of integers, so a row's result does not depend on the other rows.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from mara_integrations.errors import ConfigError, ModelError

_LEVELS = 127.0
_FINER = 254.0  # fine levels in a coarse one
# The kernels that are fast take unsigned inputs: 128 stands for 0. Flipping the first bit of a signed byte adds 128.
_ZERO_POINT = 128
_ADD_ZERO_POINT = torch.tensor(-128, dtype=torch.int8)
_A_LEVEL, _FINE_LEVELS = torch.tensor(1.0 / _LEVELS), torch.tensor(_FINER)  # Python's numbers take 2 µs longer
_LEAST = 1e-20  # a row of zeros has a scale too

_OTHER_LOADERS = {"quantization_config", "device_map", "tp_plan", "tp_size", "distributed_config"}
_PROBE_ROWS, _PROBE_WIDTH, _PROBE_TIMES = 64, 512, 5  # in 5 ms
_TOO_LONG = 2.0  # 0.8 where there are instructions, of weights in the cache: it gains on those that come from memory


class Int8Linear(nn.Module):
    """A linear layer of int8 weights for float32 inputs.

    Args:
        weight: Shape (out, in), int8, in -127 to 127.
        scale: Size of one step of each output's weights, shape (out,).
        bias: Shape (out,), float32.
    """

    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        # No buffers: nothing but these kernels can read the first, and the other says nothing.
        self._packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)  # (in, out), in the kernels' order
        self._no_zero_points = torch.zeros(self.out_features, dtype=torch.int32)
        self._rows: Tensor | None = None  # the weight in the usual order, once somebody asked for rows of it

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear) -> Int8Linear:
        """Round a linear layer to int8; the largest weight of each output becomes 127."""
        weight = linear.weight.float()
        scale = (weight.abs().amax(1) / _LEVELS).clamp_min_(_LEAST)
        bias = None if linear.bias is None else linear.bias.detach().float()
        return cls((weight / scale[:, None]).round_().char(), scale, bias)

    @property
    def weight(self) -> Tensor:
        """A copy in the usual order, int8, shape (out, in)."""
        weight: Tensor = self._packed.to_dense().T
        return weight

    def rows(self, outputs: Tensor) -> Tensor:
        """Return the weights of some outputs, (N,) to float32 (N, in); the first call makes a copy of all, in int8."""
        if self._rows is None:
            self._rows = self.weight.contiguous()
        return self._rows[outputs].float() * self.scale[outputs, None]

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""
        return self.out_features * self.in_features

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        step = x.abs().amax(-1, keepdim=True).clamp_min_(_LEAST).mul_(_A_LEVEL)  # (…, 1)
        levels = x / step
        coarse = levels.round()
        fine = levels.sub_(coarse).mul_(_FINE_LEVELS).round_()
        both = torch.stack((coarse, fine)).char().bitwise_xor_(_ADD_ZERO_POINT).view(torch.uint8)  # (2, …, in)
        products: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(both, 1.0, _ZERO_POINT, self._packed, self.scale, self._no_zero_points),
            *(None, 1.0, 0, torch.float32, "none", [], ""),  # bias, the output's scale and type, what comes after
        )
        coarse, fine = products.unbind()
        out = coarse.add_(fine, alpha=1.0 / _FINER).mul_(step)
        return out if self.bias is None else out.add_(self.bias)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return `forward(x)` added to `residual`, (…, out)."""
        return self.forward(x).add_(residual)


def quantize(model: nn.Module) -> None:
    """Put int8 layers in the place of a model's linear ones, one by one; whatever else it has becomes float32.

    Raises:
        ModelError: If most of its weights are in other layers: in convolutions, or joined as experts.
    """
    holders = [module for module in model.modules() if any(type(child) is nn.Linear for child in module.children())]
    for holder in holders:
        for name, child in holder.named_children():
            if type(child) is nn.Linear:
                setattr(holder, name, Int8Linear.of(child))
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():  # copied, so that the file they may be a view of is let go
            tensor.data = tensor.data.to(torch.float32, copy=True)
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    num_left = sum(weight.numel() for weight in model.parameters() if weight.dim() > 1 and weight not in embeddings)
    if num_left > sum(module.num_bytes for module in model.modules() if isinstance(module, Int8Linear)):
        raise ModelError(
            f"quantization='int8' is for linear layers; most weights of a {type(model).__name__} are in others",
            hint="leave quantization out",
        )


def is_int8(model: nn.Module) -> bool:
    """Return whether any layer has int8 weights."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def weight_bytes(model: nn.Module) -> int:
    """Return the memory of all weights, in bytes."""
    packed = sum(module.num_bytes for module in model.modules() if isinstance(module, Int8Linear))
    return packed + sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def check_int8(quantization: str, device: torch.device, dtype: torch.dtype, model_kwargs: Mapping[str, Any]) -> None:
    """Check before a model is loaded that it can be quantised here, and warn where that makes it slower.

    Raises:
        ConfigError: If it can't: another quantisation, device or number format was named, or the processor does not
            compute exact sums of int8 products.
    """
    asked = f"quantization={quantization!r}"
    others = sorted(_OTHER_LOADERS & model_kwargs.keys())
    if quantization != "int8":
        raise ConfigError(f"{asked} is not allowed", hint="allowed: int8; model_kwargs has quantization_config")
    if others:
        raise ConfigError(f"{asked} can't be combined with {others[0]}", hint="leave one of them out")
    if device.type != "cpu":
        raise ConfigError(f"{asked} is for the CPU, not for {device}", hint="device='cpu', or a quantization_config")
    if dtype != torch.float32:
        raise ConfigError(f"{asked} needs float32, not {dtype}", hint="leave dtype out")
    if problem := _processor_problem():
        raise ConfigError(f"{asked} is not supported on this machine: {problem}", hint="float32 is better here")
    if (slowdown := processor_slowdown()) > _TOO_LONG:
        warnings.warn(
            f"{asked} saves memory here, but takes {slowdown:.1f} times as long as float32: the processor has no fast "
            "instructions for it",
            stacklevel=3,
        )


@lru_cache(maxsize=1)
def _processor_problem() -> str:
    """Return what keeps the processor from multiplying bytes exactly, or ''.

    Without instructions for it, sums of two products are cut off at 16 bits.
    """
    try:
        layer, x = _probe()
        is_exact = torch.equal(layer(x), torch.full_like(x, _LEVELS**2 * _PROBE_WIDTH))
    except (AttributeError, RuntimeError) as error:  # a build of torch without oneDNN
        return f"{error}".splitlines()[0]
    return "" if is_exact else "its sums of int8 products are not exact"


@lru_cache(maxsize=1)
def processor_slowdown() -> float:
    """Return how many times as long a layer takes in int8 as in float32; without instructions it is plain loops."""
    layer, x = _probe()
    return _seconds(layer, x) / _seconds(nn.Linear(_PROBE_WIDTH, _PROBE_WIDTH, bias=False, dtype=x.dtype), x)


def _probe() -> tuple[Int8Linear, Tensor]:
    """A layer of the largest weights, and inputs for it."""
    weight = torch.full((_PROBE_WIDTH, _PROBE_WIDTH), 127, dtype=torch.int8)
    scale = torch.ones(_PROBE_WIDTH, dtype=torch.float32)
    return Int8Linear(weight, scale), torch.full((_PROBE_ROWS, _PROBE_WIDTH), _LEVELS, dtype=torch.float32)


@torch.inference_mode()
def _seconds(layer: nn.Module, x: Tensor) -> float:
    """Return the shortest of several runs, in seconds of this thread's own processor time."""
    best = float("inf")
    for _ in range(_PROBE_TIMES):
        start = time.thread_time()
        layer(x)
        best = min(best, time.thread_time() - start)
    return best
