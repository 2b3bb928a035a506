"""The method written down plainly: the whole sequence is computed anew for every candidate. Slow, short, the oracle.

It shares the head with the engine and nothing else: no cache, no batches, transformers' own filters, its own gate loop.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mara_integrations.engine.gate import selection_rule
from mara_integrations.engine.head import MARAHead
from mara_integrations.sampling import GateParams, SamplingParams


@torch.inference_mode()
def generate_reference(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    head: MARAHead | None = None,
    sampling: SamplingParams | None = None,
    gate: GateParams | None = None,
    eos_token_ids: frozenset[int] = frozenset(),
) -> list[int]:
    """Tokens of the reply, decoded by recomputing everything; stop strings are not looked at."""
    sampling, gate = sampling or SamplingParams(), gate or GateParams()
    if gate.strength == 0:
        head = None
    form = head.config.form if head else None
    temperature = 0.0 if form == "paper" else sampling.temperature
    rule = selection_rule(gate.selection if head else "auto", form, temperature)
    rng, reply = random.Random(sampling.seed), []  # type: ignore[var-annotated]  # list[int]

    def run(token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Last hidden state (d,) and logits (V,) after these tokens."""
        ids = torch.tensor([list(token_ids)], device=model.device)
        output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        return output.hidden_states[-1][0, -1], output.logits[0, -1]

    while len(reply) < sampling.max_new_tokens and not (reply and reply[-1] in eos_token_ids):
        uniform = rng.random()
        context = [*prompt_ids, *reply]
        state, logits = run(context)
        candidates, probs = _filtered(logits, sampling, temperature or 1.0)
        if len(candidates) == 1:
            reply.append(candidates[0])
            continue

        def accept_probability(k: int, context: list[int] = context, state: Tensor = state, probs: list[float] = probs,
                               candidates: list[int] = candidates) -> float:  # fmt: skip
            hazard = probs[k] / sum(probs[k:])
            if head is None:
                return hazard
            score = float(head.score(run([*context, candidates[k]])[0][None], state[None])[0])
            if form == "paper":
                return 1 / (1 + math.exp(-max(min(score, 700.0), -700.0)))
            hazard = min(max(hazard, 1e-13), 1 - 1e-13)
            z = math.log(hazard / (1 - hazard)) + gate.strength * head.config.strength * score
            return 1 / (1 + math.exp(-max(min(z, 700.0), -700.0)))

        reply.append(candidates[_take(len(candidates), accept_probability, rule, gate.fallback, uniform)])
    return reply


def _filtered(logits: Tensor, sampling: SamplingParams, temperature: float) -> tuple[list[int], list[float]]:
    """Survivors of transformers' warpers and their probabilities, most probable first, ties by token id."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature)), TopKLogitsWarper(sampling.top_k, min_tokens_to_keep=sampling.min_candidates)])  # fmt: skip
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p, min_tokens_to_keep=sampling.min_candidates))
    scores = warpers(torch.empty(1, 0, dtype=torch.long), logits[None].float())[0]  # type: ignore[arg-type]  # unread ids
    survivors = scores.isfinite().nonzero()[:, 0].tolist()
    probs = scores.double().softmax(-1)
    survivors.sort(key=lambda token_id: (-float(scores[token_id]), token_id))
    return survivors, [float(probs[token_id]) for token_id in survivors]


def _take(count: int, accept_probability, rule: str, fallback: str, uniform: float) -> int:  # type: ignore[no-untyped-def]
    if rule == "first":
        probabilities = []
        for k in range(count):
            probabilities.append(accept_probability(k))
            if probabilities[-1] > 0.5:
                return k
        return {"first": 0, "last": count - 1, "best": probabilities.index(max(probabilities))}[fallback]
    remaining, gated = 1.0, []
    for k in range(count):
        accept = 1.0 if k == count - 1 else accept_probability(k)
        gated.append(remaining * accept)
        remaining *= 1 - accept
    if rule == "greedy":
        return gated.index(max(gated))
    total = 0.0
    for k, prob in enumerate(gated):
        total += prob
        if total > uniform:
            return k
    return count - 1
