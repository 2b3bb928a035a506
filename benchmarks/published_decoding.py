"""The paper's decoding procedure with a current cache, the baseline of speed: one forward a candidate visited."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from mara_integrations.engine.backends.forward import cache_argument
from mara_integrations.engine.backends.hooks import hooks_undone
from mara_integrations.heads.afterstate import AfterstateHead


@torch.inference_mode()
def generate_published(
    model: PreTrainedModel, head: AfterstateHead, prompt_ids: Sequence[int], max_new_tokens: int
) -> list[int]:
    """Return the tokens of a reply of this length under a head of the paper's form.

    Filters over the whole vocabulary, candidates one by one in falling order, the first one when all are rejected. Only
    the cache differs from the published code, which lets rejected candidates leave their keys and values behind.

    Source: Zhang et al. 2025 (arXiv 2505.19743), section 3 and its published inference code.
    """
    warpers = LogitsProcessorList([TopKLogitsWarper(40), TopPLogitsWarper(0.95)])
    cache: Any = DynamicCache(config=model.config)
    no_ids = cast(LongTensor, torch.empty(1, 0, dtype=torch.long, device=model.device))  # these warpers read none
    reply: list[int] = []
    with hooks_undone(model):
        logits, state = _forward(model, prompt_ids, cache)
        while len(reply) < max_new_tokens:
            order = warpers(no_ids, cast(FloatTensor, logits.float()))[0].sort(descending=True)
            candidates = order.indices[order.values.isfinite()].tolist()
            first = taken = None
            for candidate in candidates:
                branch = copy.copy(cache)  # its tensors are replaced on update, not written to
                branch.layers = [copy.copy(layer) for layer in cache.layers]
                seen = _forward(model, [candidate], branch)
                first = first or (candidate, branch, seen)
                if len(candidates) == 1 or float(head.score(seen[1], state)[0]) > 0:
                    taken = (candidate, branch, seen)
                    break
            chosen = taken or first
            assert chosen is not None, "there is always a candidate"
            token_id, cache, (logits, state) = chosen
            reply.append(token_id)
    return reply


def _forward(model: PreTrainedModel, token_ids: Sequence[int], cache: Any) -> tuple[Tensor, Tensor]:
    """Return the logits (1, V) and the hidden state (1, d) of the last token."""
    ids = torch.tensor([list(token_ids)], device=model.device)
    out = model(input_ids=ids, use_cache=True, output_hidden_states=True, **{cache_argument(model): cache})
    return out.logits[:, -1], out.hidden_states[-1][0, -1:]
