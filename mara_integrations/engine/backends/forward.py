"""Final hidden states and logits of a transformers model, computed apart so that rejected candidates need no logits."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from mara_integrations.engine.backends.hooks import hooks_undone
from mara_integrations.errors import ModelError
from mara_integrations.models.int8 import Int8Linear


def decoder_of(model: PreTrainedModel) -> Any:
    """Return the part of a model that ends in its final norm."""
    decoder = model.get_decoder()
    return model.model if decoder is model else decoder  # Llama 4 finds only itself


def input_embeddings(model: PreTrainedModel) -> Tensor:
    """Return the input embeddings, shape (V, d)."""
    return cast(Tensor, model.get_input_embeddings().weight)


def logits_function(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return what computes logits: `lm_head`, or the model's own code after its decoder (soft caps, scalings)."""
    lm_head, embeddings = model.get_output_embeddings(), input_embeddings(model)
    probe = torch.arange(len(embeddings), device=embeddings.device)[None, -5:]
    with torch.inference_mode(), hooks_undone(model):
        output = model(input_ids=probe, output_hidden_states=True, use_cache=False)
        hidden, want = output.hidden_states[-1][0], output.logits[0]
        if lm_head is not None and torch.allclose(lm_head(hidden).float(), want.float(), rtol=1e-3, atol=1e-3):
            return cast(Callable[[Tensor], Tensor], lm_head)
    decoder, tail = decoder_of(model), copy.copy(model)
    tail._modules = dict(model._modules)  # a shallow copy: the user's model keeps its decoder, the weights are shared
    for name, child in model.named_children():
        if any(module is decoder for module in child.modules()):
            tail._modules[name] = _Finished(decoder)

    def to_logits(hidden: Tensor) -> Tensor:
        logits: Tensor = tail(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits

    return to_logits


def weights_version(model: PreTrainedModel) -> Hashable:
    """Return a value that changes when the weights of a model are changed or moved, or its attention is replaced."""
    stamps = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())
    return model.config._attn_implementation, stamps


def takes(module: nn.Module, argument: str) -> bool:
    """Return whether the forward of a module declares an argument of this name."""
    return argument in inspect.signature(module.forward).parameters


def cache_argument(module: nn.Module) -> str:
    """Return the name under which a forward takes its cache.

    transformers 5.24 renamed `past_key_values` to `cache`; 5.40 drops the old name.
    """
    return "cache" if takes(module, "cache") else "past_key_values"


def output_embeddings(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """Return the rows of the output embeddings of tokens, (N,) to float32 (N, d).

    Raises:
        ModelError: If they are quantised, and not the input embeddings too.
    """
    lm_head = model.get_output_embeddings()
    is_tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    if isinstance(lm_head, Int8Linear) and not is_tied:
        return lm_head.rows(token_ids)
    uses_input = lm_head is None or isinstance(lm_head, Int8Linear)
    table = input_embeddings(model) if uses_input else cast(Tensor, lm_head.weight)
    if not table.is_floating_point() or table.dim() != 2:
        raise ModelError(
            f"the output embeddings of a {type(model).__name__} are quantised as {table.dtype}: "
            "a head of the 'q' form can't read them",
            hint="leave lm_head out of the quantisation, or use a head of another form",
        )
    return embedding(token_ids.to(table.device), table.detach()).float()


class _Finished(nn.Module):
    """Takes a decoder's place and returns its input as the decoder's result."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.config = decoder.config

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)
