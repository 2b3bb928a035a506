"""The method written down plainly: the whole sequence is computed anew for every candidate. Slow, short, the oracle.

It shares the head and the meaning of the settings with the engine, and nothing else: no cache, no batches,
transformers' own filters, a gate loop of its own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers import TemperatureLogitsWarper as Temperature
from transformers import TopKLogitsWarper as TopK
from transformers import TopPLogitsWarper as TopP

from mara_integrations.engine.backends.forward import output_embeddings
from mara_integrations.engine.backends.hooks import hooks_undone
from mara_integrations.engine.gate import Rule, selection_rule
from mara_integrations.heads.compose import Head, afterstate_parts, q_parts
from mara_integrations.sampling import Fallback, GateParams, SamplingParams


@runtime_checkable
class PlainModel(Protocol):
    """A model that computes whole sequences anew; for models that are not modules of transformers."""

    @property
    def noise(self) -> float:
        """How far two orders of computing may lie apart, as a share of the largest number compared."""

    def run(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the hidden state (d,) and the logits (V,) of the last token, computed from the first one on."""

    def output_embeddings(self, token_ids: Tensor) -> Tensor:
        """Return the rows of the output embeddings of tokens, (N,) to float32 (N, d)."""


AnyModel: TypeAlias = PreTrainedModel | PlainModel


@dataclass(frozen=True, slots=True)
class ReferencePosition:
    """One position, decided by recomputing everything.

    Attributes:
        candidates: Token ids, most probable first.
        probs: Probabilities of the candidates, renormalised.
        accept_logits: Accept logits of the candidates.
        scores: The head's part in these, at the strength of the request; 0 without a head.
        logits: Logits of the whole vocabulary, divided by the temperature; float32, shape (V,).
        rule: Rule by which a candidate was taken.
        taken: Index of the candidate taken.
    """

    candidates: list[int]
    probs: list[float]
    accept_logits: list[float]
    scores: list[float]
    logits: Tensor
    rule: Rule
    taken: int


@torch.inference_mode()
def decide_reference(
    model: AnyModel,
    context: Sequence[int],
    head: Head | None,
    sampling: SamplingParams,
    gate: GateParams,
    uniform: float,
) -> ReferencePosition:
    """Decide the position after these tokens; `uniform` is its random number."""
    head = head if gate.strength > 0 else None
    form = head.config.form if head else None
    temperature = 0.0 if form == "paper" else sampling.temperature
    rule = selection_rule(gate.selection if head else "auto", form, temperature)
    state, logits = recompute(model, context)
    candidates, probs = _candidates(logits, sampling, temperature or 1.0)
    scores = [0.0] * len(candidates)
    if head is not None and len(candidates) > 1:
        scores = [gate.strength * _q(model, head, state, candidate) for candidate in candidates]
    largest = max(scores)
    weights = [prob * math.exp(score - largest) for prob, score in zip(probs, scores, strict=True)]
    accept_logits = []
    for k, candidate in enumerate(candidates):
        left = sum(weights[k:])  # 0 where a small temperature makes it too small for a float
        hazard = min(max(weights[k] / left if left else 0.5, 1e-13), 1 - 1e-13)
        z = math.log(hazard / (1 - hazard))
        if head is not None and len(candidates) > 1 and afterstate_parts(head):
            seen = recompute(model, [*context, candidate])[0]
            parts = [w * float(part.score(seen[None], state[None])[0]) for part, w in afterstate_parts(head).items()]
            score = gate.strength * sum(parts)
            z = score if form == "paper" else z + score
            scores[k] += score
        accept_logits.append(z)
    taken = _TAKE[rule](accept_logits, gate.fallback, uniform)
    return ReferencePosition(
        candidates, probs, accept_logits, scores, logits.float() / (temperature or 1.0), rule, taken
    )


def _q(model: AnyModel, head: Head, state: Tensor, candidate: int) -> float:
    """Return the sum of the Q-heads' scores of a candidate, from the state before it."""
    ids = torch.tensor([candidate], device=state.device)
    row = model.output_embeddings(ids) if isinstance(model, PlainModel) else output_embeddings(model, ids)
    row = row.to(state.device)
    return sum(weight * float(part.score(state[None], row)[0]) for part, weight in q_parts(head).items())


def generate_reference(
    model: AnyModel,
    prompt_ids: Sequence[int],
    head: Head | None = None,
    sampling: SamplingParams | None = None,
    gate: GateParams | None = None,
    eos_token_ids: frozenset[int] = frozenset(),
) -> list[int]:
    """Tokens of the reply, decoded by recomputing everything; stop strings are not looked at."""
    sampling, gate = sampling or SamplingParams(), gate or GateParams()
    rng = random.Random(sampling.seed)
    reply: list[int] = []
    while len(reply) < sampling.max_new_tokens and not (reply and reply[-1] in eos_token_ids):
        position = decide_reference(model, [*prompt_ids, *reply], head, sampling, gate, rng.random())
        reply.append(position.candidates[position.taken])
    return reply


def recompute(model: AnyModel, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the hidden state (d,) and the logits (V,) of the last token, computed from the first one on."""
    if isinstance(model, PlainModel):
        return model.run(token_ids)
    ids = torch.tensor([list(token_ids)], device=model.device)
    with hooks_undone(model):
        output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    return output.hidden_states[-1][0, -1], output.logits[0, -1]


def _candidates(logits: Tensor, sampling: SamplingParams, temperature: float) -> tuple[list[int], list[float]]:
    """Survivors of transformers' warpers and their probabilities, most probable first, ties by token id."""
    keep = sampling.min_candidates
    warpers = LogitsProcessorList([Temperature(float(temperature)), TopK(sampling.top_k, min_tokens_to_keep=keep)])
    if sampling.top_p < 1.0:
        warpers.append(TopP(sampling.top_p, min_tokens_to_keep=keep))
    no_ids = torch.empty(1, 0, dtype=torch.long, device=logits.device)  # these warpers do not look at them
    scores = warpers(cast(LongTensor, no_ids), cast(FloatTensor, logits[None].float()))[0].cpu()
    probs = scores.double().softmax(-1).tolist()
    survivors = scores.isfinite().nonzero()[:, 0].tolist()
    survivors.sort(key=lambda token_id: (-probs[token_id], token_id))
    return survivors, [probs[token_id] for token_id in survivors]


def _first_accepted(accept_logits: list[float], fallback: Fallback, uniform: float) -> int:
    for k, z in enumerate(accept_logits):
        if z > 0 or len(accept_logits) == 1:
            return k
    return {"first": 0, "last": len(accept_logits) - 1, "best": accept_logits.index(max(accept_logits))}[fallback]


def _distribution(accept_logits: list[float]) -> list[float]:
    """Probability of each candidate: all before it were rejected, it is accepted; the last one is forced."""
    left, probs = 1.0, []
    for z in accept_logits[:-1]:
        accept = 1 / (1 + math.exp(-max(min(z, 700.0), -700.0)))
        probs.append(left * accept)
        left *= 1 - accept
    return [*probs, left]


def _most_probable(accept_logits: list[float], fallback: Fallback, uniform: float) -> int:
    probs = _distribution(accept_logits)
    return probs.index(max(probs))


def _drawn(accept_logits: list[float], fallback: Fallback, uniform: float) -> int:
    total = 0.0
    for k, prob in enumerate(_distribution(accept_logits)):
        total += prob
        if total > uniform:
            return k
    return len(accept_logits) - 1


_TAKE: dict[Rule, Callable[[list[float], Fallback, float], int]] = {
    "first": _first_accepted,
    "greedy": _most_probable,
    "sample": _drawn,
}
