"""Engine against reference: where their tokens first differ, how close the decision was, and whether that is noise.

Both compute the same numbers in a different order, so their last digits differ. The contract: tokens are equal except
where a decision was closer than `NOISE` allows for the model's number format.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mara_integrations.engine.gate import gated_log_probs
from mara_integrations.engine.oracle.reference import (
    AnyModel,
    PlainModel,
    ReferencePosition,
    decide_reference,
    generate_reference,
)
from mara_integrations.engine.request import Request
from mara_integrations.models.int8 import is_int8
from mara_integrations.sampling import Fallback, SamplingParams

# How far two orders of computing may lie apart, as a share of the largest number compared. Seen: 2e-5 in hidden states
# of a 30-layer model in float32, where sums of a thousand products differ; in half precision sums are kept in float32
# and only a few roundings of 2^-8 (bfloat16) or 2^-11 (float16) add up. Heads amplify either. Inputs of int8 layers are
# rounded to 16 bits: what differs in the last digits of float32 may end on another level. Seen: 8e-4 in 30 layers.
_INT8_NOISE = 0.008
NOISE = {torch.float32: 2.5e-4, torch.bfloat16: 0.0625, torch.float16: 0.0078, torch.float64: 1e-9}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Disagreement:
    """The first place where engine and reference took different tokens; all numbers are the reference's.

    Attributes:
        position: Place in the reply, from 0.
        token_ids: The token that the engine took, and the one that the reference took.
        logit_gap: How far logits would have to move for other candidates or another order, down to the later token.
        gate_margin: How far accept logits would have to move for another decision.
        logit_bound: The largest gap that counts as noise.
        gate_bound: The largest margin that counts as noise.
    """

    position: int
    token_ids: tuple[int, int]
    logit_gap: float
    gate_margin: float
    logit_bound: float
    gate_bound: float

    @property
    def is_noise(self) -> bool:
        """The decision was closer than the number format can tell."""
        return self.logit_gap < self.logit_bound or self.gate_margin < self.gate_bound


@dataclass(frozen=True, slots=True)
class Verification:
    """A reply of the engine beside the reference's.

    Attributes:
        token_ids: The engine's tokens.
        reference_ids: The reference's tokens.
        disagreement: None where they are equal; after the first one, two different texts are continued.
    """

    token_ids: tuple[int, ...]
    reference_ids: tuple[int, ...]
    disagreement: Disagreement | None

    @property
    def holds(self) -> bool:
        """The contract: equal, or different by noise."""
        return self.disagreement is None or self.disagreement.is_noise


def verify(model: AnyModel, request: Request, token_ids: Sequence[int]) -> Verification:
    """Compare the engine's tokens for a request with the reference's; a disagreement is logged."""
    assert request.sampling.seed is not None, "the reference draws the same random numbers"
    sampling, gate, head = request.sampling, request.gate, request.head
    reference = generate_reference(model, request.prompt_ids, head, sampling, gate, request.eos_token_ids)
    if list(token_ids) == reference:
        return Verification(tuple(token_ids), tuple(reference), None)
    pairs = zip(token_ids, reference, strict=False)
    place = next(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)
    rng = random.Random(sampling.seed)
    uniform = [rng.random() for _ in range(place + 1)][-1]
    context = [*request.prompt_ids, *reference[:place]]
    position = decide_reference(model, context, head, sampling, gate, uniform)
    share = _noise(model)
    logit_bound = share * max(1.0, float(position.logits[position.candidates].abs().max()))
    disagreement = Disagreement(
        position=place,
        token_ids=(token_ids[place], reference[place]),
        logit_gap=_logit_gap(position, token_ids[place], sampling),
        gate_margin=_gate_margin(position, gate.fallback, uniform),
        logit_bound=logit_bound,
        gate_bound=logit_bound + share * max(map(abs, position.scores)),
    )
    level = logging.INFO if disagreement.is_noise else logging.WARNING
    _log.log(level, "engine and reference differ%s: %s", " by noise" if disagreement.is_noise else "", disagreement)
    return Verification(tuple(token_ids), tuple(reference), disagreement)


def _noise(model: AnyModel) -> float:
    if isinstance(model, PlainModel):
        return model.noise
    share = _INT8_NOISE if is_int8(model) else NOISE[model.dtype]
    if getattr(model, "is_quantized", False):  # layers may round states to 8 bits, which a last digit can decide
        share = max(share, NOISE[torch.bfloat16])
    return share


def _logit_gap(position: ReferencePosition, other: int, sampling: SamplingParams) -> float:
    """Least distance of logits, down to the later token, that decides about order, top-k or top-p."""
    ranked = position.logits.sort(descending=True).values[: sampling.top_k + 1].double()
    last = len(position.candidates) - 1
    depth = position.candidates.index(other) if other in position.candidates else last + 1
    depth = min(max(depth, position.taken) + 1, len(ranked) - 1)
    gaps = (ranked[:-1] - ranked[1:])[:depth].tolist()
    if sampling.top_p < 1.0:
        tail = ranked[: sampling.top_k].softmax(-1).flip(-1).cumsum(-1).flip(-1)[1:]
        gaps += [abs(logit - _logit(1.0 - sampling.top_p)) for logit in map(_logit, tail.tolist())]
    return min(gaps, default=math.inf)


def _gate_margin(position: ReferencePosition, fallback: Fallback, uniform: float) -> float:
    """Least distance of an accept logit, or of the logarithm of a probability, that decides about the token."""
    z = torch.tensor(position.accept_logits, dtype=torch.float64)
    if len(z) == 1:
        return math.inf
    if position.rule == "first":
        accepted = (z > 0).nonzero()[:, 0].tolist()
        visited = z[: accepted[0] + 1] if accepted else z
        margin = float(visited.abs().min())
        if not accepted and fallback == "best":
            best = z.topk(2).values
            margin = min(margin, float(best[0] - best[1]))
        return margin
    log_probs = gated_log_probs(z[None], torch.ones(1, len(z), dtype=torch.bool))[0]
    if position.rule == "greedy":
        best = log_probs.topk(2).values
        return float(best[0] - best[1])
    bounds = log_probs.exp().cumsum(-1)[:-1].tolist()
    return min(abs(_logit(uniform) - _logit(bound)) for bound in bounds)


def _logit(probability: float) -> float:
    clamped = min(max(probability, 1e-15), 1 - 1e-15)
    return math.log(clamped / (1 - clamped))
