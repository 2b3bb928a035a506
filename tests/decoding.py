"""Requests that differ in everything a request may say, and the reference's replies to them."""

from __future__ import annotations

import hashlib

import torch

from mara_integrations.engine.backends.forward import output_embeddings
from mara_integrations.engine.backends.hooks import hooks_undone
from mara_integrations.engine.oracle.reference import PlainModel, generate_reference
from mara_integrations.engine.request import Request
from mara_integrations.heads.compose import ComposedHead, afterstate_parts
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import random_head

FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gpt2": {},
    "gemma": {},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8, "num_hidden_layers": 7},
    "mistral": {"sliding_window": 6},
    "cohere": {},
    "gpt_oss": {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}  # fmt: skip


def prompt(length, seed=0, vocab_size=256):
    return torch.randint(1, vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def mixed_requests(model, count=7, max_new_tokens=6):
    """Requests that differ in everything a request may say."""
    forms = ["paper", "q", "value", None, "q", "residual", "residual and q"]
    for i in range(count):
        form = forms[i % len(forms)]
        head = random_head(32, form.split()[0], accept_rate=[0.9, 0.4, 0.1][i % 3], seed=i) if form else None
        if form == "residual and q":
            head = ComposedHead({head: 0.5, random_head(32, "q", seed=i): 1.0})
        sampling = SamplingParams(
            max_new_tokens=max_new_tokens + i % 3,
            temperature=0.9 * (i % 2),
            top_k=12 - 4 * (i % 3),
            min_candidates=1 + (i == 1),
            seed=i,
        )
        gate = GateParams(fallback=("first", "last", "best")[i % 3], strength=0.7 if form == "value" else 1.0)
        yield Request(prompt(2 + 5 * i, seed=i), sampling, gate, head)


class Recomputed(PlainModel):
    """A model that computes whole sequences anew, those of all candidates of a position in one forward.

    The reference asks for one at a time, which takes thirty times as long.

    Args:
        model: A causal language model.
        num_candidates: How many of the most probable tokens are computed with the one that is asked for.
    """

    noise = 0.0

    def __init__(self, model, num_candidates):
        self._model, self._num_candidates = model, num_candidates
        self._known = {}  # states and logits of the last token, by the sequence

    @torch.inference_mode()
    def run(self, token_ids):
        wanted = tuple(token_ids)
        if wanted not in self._known:
            *before, last = wanted
            tokens = {last}
            if tuple(before) in self._known:
                _, logits = self._known[tuple(before)]
                tokens.update(logits.topk(min(self._num_candidates, len(logits))).indices.tolist())
            sequences = [(*before, token) for token in sorted(tokens)]
            with hooks_undone(self._model):
                output = self._model(torch.tensor(sequences), output_hidden_states=True, use_cache=False)
            last_ones = output.hidden_states[-1][:, -1].clone(), output.logits[:, -1].clone()
            self._known.update(zip(sequences, zip(*last_ones, strict=True), strict=True))
        return self._known[wanted]

    def output_embeddings(self, token_ids):
        return output_embeddings(self._model, token_ids)


def recomputed_reply(model, prompt_ids, head=None, sampling=None, gate=None, eos_token_ids=frozenset()):
    """Return the reference's tokens, from whole sequences."""
    sampling, gate = sampling or SamplingParams(), gate or GateParams()
    asks_for_all = head is not None and gate.strength > 0 and afterstate_parts(head)
    model = Recomputed(model, max(sampling.top_k, sampling.min_candidates) if asks_for_all else 0)
    return generate_reference(model, prompt_ids, head, sampling, gate, eos_token_ids)


_replies = {}  # of the reference, by everything that they depend on


def reference(model, prompt_ids, head=None, sampling=None, gate=None, eos_token_ids=frozenset()):
    """The reference's tokens; a test that is run on several backends computes them once."""
    sampling = sampling or SamplingParams()
    weighted = getattr(head, "parts", {head: 1.0}) if head is not None else {}
    heads = tuple((_digest(part), part.config.model_dump_json(), weight) for part, weight in weighted.items())
    settings = (sampling.model_dump_json(), gate and gate.model_dump_json(), eos_token_ids)
    key = (_digest(model), model.config.to_json_string(), heads, tuple(prompt_ids), settings)
    if key not in _replies:
        _replies[key] = recomputed_reply(model, prompt_ids, head, sampling, gate, eos_token_ids)
    return list(_replies[key])


def _digest(module):
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().float().numpy().tobytes())
    return digest.hexdigest()


def references(model, requests):
    return [reference(model, r.prompt_ids, r.head, r.sampling, r.gate, r.eos_token_ids) for r in requests]
