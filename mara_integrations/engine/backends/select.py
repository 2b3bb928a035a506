"""Choose the fastest backend that gives a model's own hidden states and logits."""

from __future__ import annotations

import logging
import warnings

import torch
import transformers
from transformers import PreTrainedModel

from mara_integrations.engine.backends import attention
from mara_integrations.engine.backends.cuda_graphs import GraphedBackend
from mara_integrations.engine.backends.fused import FusedBackend
from mara_integrations.engine.backends.packed import PackedBackend
from mara_integrations.engine.backends.probe import probed, why_not_packed
from mara_integrations.engine.backends.protocol import Backend
from mara_integrations.engine.backends.serial import SerialBackend
from mara_integrations.errors import ModelError
from mara_integrations.models import experimental, ranks

_log = logging.getLogger(__name__)


def make_backend(model: PreTrainedModel, name: str = "the model") -> Backend:
    """Return the fastest backend that computes what the model computes, as a probe shows: packed, or else serial.

    Raises:
        ConfigError: If `MARA_EXPERIMENTAL` names an unknown feature.
        ModelError: If not even the serial one does: the model is not a causal language model we can drive.
    """
    if any(map(ranks.is_spread, model.parameters())):
        raise ModelError(
            f"{name} ({type(model).__name__}) is spread over processes that do not follow this one",
            hint="give its name and model_kwargs={'tp_plan': 'auto'} in place of the loaded model",
        )
    reason = why_not_packed(model)
    if not reason:
        for kind in packed_kinds(model.device):
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
            hint=f"models built of attention layers work; transformers after {transformers.__version__} may help",
        )
    return serial


def packed_kinds(device: torch.device) -> tuple[type[PackedBackend], ...]:
    """Return the packed backends to try for a model on this device, the fastest first.

    Raises:
        ConfigError: If `MARA_EXPERIMENTAL` names an unknown feature.
    """
    if device.type != "cuda":
        return FusedBackend, PackedBackend
    return (GraphedBackend, PackedBackend) if experimental.is_enabled("cuda-graphs") else (PackedBackend,)
