"""Checks that a backend gives a model's own hidden states and logits, run before the backend is used."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mara_integrations.engine.backends.forward import input_embeddings
from mara_integrations.engine.backends.hooks import hooks_undone
from mara_integrations.engine.backends.packed import PackedBackend
from mara_integrations.engine.backends.protocol import Backend, Segment
from mara_integrations.engine.backends.serial import SerialBackend
from mara_integrations.engine.backends.windows import has_windows, narrowed
from mara_integrations.models.int8 import is_int8

# What a wrong attention exceeds, and layers that round to 8 bits do not.
_MOST_ROUNDED = 0.25


def why_not_packed(model: PreTrainedModel) -> str:
    """Return why a model can't be decoded packed, as far as is known without trying; '' if nothing is known."""
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
    """Return a backend that computes what its model computes; or None, and the reason."""
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
    """Return how far a backend's numbers lie from those of plain forwards, as a share of their size."""
    prompt = torch.randint(len(input_embeddings(model)), (9,), generator=torch.Generator().manual_seed(0)).tolist()
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
