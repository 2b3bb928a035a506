"""Fingerprints of base models: whether two are the same, whatever they are called.

A fingerprint holds a hash of the model's sizes, and a sample of its weights: numbers of normalisation layers, which
quantisation leaves as they are, and numbers of matrices, which it rounds. It takes milliseconds, and survives other
names, folders, `.gguf` files and number formats.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_VERSION = "1"
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")
_NUM_TENSORS, _NUM_VALUES = 8, 8  # sampled of each kind, and of each tensor
_SAME = 0.01  # relative difference that number formats make; bfloat16 rounds by up to 0.004
_ROUNDED = 0.5  # that a quantisation makes: of 4 bits 0.1; of unrelated weights it is 1.4


def fingerprint(model: Any, *, is_quantised: bool = False, weight_of: Callable[[str], Any] | None = None) -> str | None:
    """Return the fingerprint of a causal language model of transformers; None where its weights can't be read here.

    Args:
        model: The model, on any device.
        is_quantised: Its weights are rounded, also where nothing in its config says so.
        weight_of: Reads a weight by its name, for a model whose weights are not in memory.
    """
    config = model.config.get_text_config()
    sizes = hashlib.sha256(repr([getattr(config, name, None) for name in _SIZES]).encode()).hexdigest()[:8]
    vectors, matrices = [], []
    embeddings = {id(model.get_input_embeddings().weight), id(getattr(model.get_output_embeddings(), "weight", None))}
    for name, weight in sorted(model.named_parameters()):
        if weight_of is None and (weight.is_meta or hasattr(weight, "to_local")):  # on disk, or in other processes
            return None
        if not name.endswith("weight") or id(weight) in embeddings:
            continue
        if weight.dim() == 1:
            vectors.append((name, weight))
        elif weight.dim() == 2:
            matrices.append((name, weight))
    if not all(weight.is_floating_point() for _, weight in matrices):  # packed
        matrices = []
    is_quantised = is_quantised or getattr(model.config, "quantization_config", None) is not None
    is_quantised = is_quantised or "gguf" in str(getattr(model, "name_or_path", "")).lower()
    kind = "rounded" if is_quantised else "exact"
    samples = (_packed(_sample(sampled, weight_of)) for sampled in (vectors, matrices))
    return ":".join((_VERSION, kind, sizes, *samples))


def same_model(one: str | None, other: str | None) -> bool | None:
    """Return whether two fingerprints are of one model; None where they do not tell.

    A fine-tuned model is another one, unless quantisation hides the difference.
    """
    first, second = _Parts.of(one), _Parts.of(other)
    if first is None or second is None:
        return None
    if first.sizes != second.sizes or not _agree(first.vectors, second.vectors, _SAME):
        return False
    is_exact = first.is_exact and second.is_exact
    if len(first.matrices) == 0 or len(second.matrices) == 0:
        return None if is_exact else True
    return _agree(first.matrices, second.matrices, _SAME if is_exact else _ROUNDED)


@dataclass(frozen=True, slots=True)
class _Parts:
    """The parts of a fingerprint.

    Attributes:
        is_exact: The weights are not quantised.
        sizes: Hash of the model's sizes.
        vectors: Sample of the normalisation layers.
        matrices: Sample of the matrices; none where they are packed.
    """

    is_exact: bool
    sizes: str
    vectors: NDArray[np.float32]
    matrices: NDArray[np.float32]

    @classmethod
    def of(cls, text: str | None) -> _Parts | None:
        """Read a fingerprint; None for what is none, or one of another version."""
        match (text or "").split(":"):
            case [version, kind, sizes, vectors, matrices] if version == _VERSION:
                try:
                    return cls(kind == "exact", sizes, _unpacked(vectors), _unpacked(matrices))
                except ValueError:
                    return None
        return None


def _sample(tensors: list[tuple[str, Any]], weight_of: Callable[[str], Any] | None) -> list[float]:
    """Evenly spaced numbers of evenly spaced tensors."""
    values: list[float] = []
    for index in _spaced(len(tensors), _NUM_TENSORS):
        name, weight = tensors[index]
        flat = (weight if weight_of is None else weight_of(name)).detach().reshape(-1)
        values += flat[_spaced(len(flat), _NUM_VALUES)].float().tolist()
    return values


def _spaced(length: int, count: int) -> list[int]:
    return sorted({(length - 1) * i // (count - 1) for i in range(count)}) if length else []


def _packed(values: list[float]) -> str:
    return base64.b64encode(np.clip(values, -65_504, 65_504).astype("<f2").tobytes()).decode()


def _unpacked(text: str) -> NDArray[np.float32]:
    values = np.frombuffer(base64.b64decode(text, validate=True), "<f2").astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("a fingerprint has finite numbers")
    return values


def _agree(one: NDArray[np.float32], other: NDArray[np.float32], tolerance: float) -> bool:
    if one.shape != other.shape:
        return False
    difference, size = (float(np.linalg.norm(values)) for values in (one - other, one))
    return difference <= tolerance * max(size, 1e-6)
