"""The gate: from a head's scores to the token taken. Pure; decoding, training and tests all use these functions.

Candidates are visited from the most probable down; candidate k is accepted with probability sigmoid(z_k), z_k its
accept logit, and the last one is forced where the rule is a distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from mara_integrations.errors import ConfigError
from mara_integrations.sampling import Fallback, GateParams, HeadForm, Selection

Rule = Literal["first", "greedy", "sample"]
_Number = TypeVar("_Number", float, Tensor)


def selection_rule(selection: Selection, form: HeadForm | None, temperature: float) -> Rule:
    """Return the rule that `auto` stands for: `first` for heads of the paper's form, else by the temperature."""
    if selection != "auto":
        return selection
    if form == "paper":
        return "first"
    return "sample" if temperature > 0 else "greedy"


def weighted_log_probs(log_probs: Tensor, scores: Tensor, strength: Tensor | float, live: Tensor) -> Tensor:
    """Log-probability of each candidate where all have a score: p(c) exp(strength * q(c)), renormalised.

    Args:
        log_probs: Log-probabilities of the candidates under the base model, filtered and renormalised, in nats, (B, K).
        scores: q of each candidate, shape (B, K).
        strength: Multiplies q; a number, or one a row, shape (B, 1). 0 is exactly the base model.
        live: Which columns are candidates, a prefix of each row, shape (B, K).

    Returns:
        Shape (B, K), in nats; -inf where not live.

    Source: optimum of E[q] - KL / strength over distributions on the candidates.
    """
    return (log_probs + strength * scores).masked_fill(~live, -torch.inf).log_softmax(-1)


def weighted_kl(log_probs: Tensor, scores: Tensor, strength: Tensor | float, live: Tensor) -> Tensor:
    """KL(gate || base) of each position, exactly, shape (B,), in nats; arguments as in `weighted_log_probs`."""
    gated = weighted_log_probs(log_probs, scores, strength, live)
    return (gated.exp() * torch.where(live, gated - log_probs, 0.0)).sum(-1)


def tail_values(log_probs: Tensor, scores: Tensor, strength: Tensor | float, live: Tensor) -> Tensor:
    """Value of passing a candidate over: V_k = log of the p-average of exp(strength * q) over the later candidates.

    With it, Q-heads are a form of the sequential rule: the accept logit hazard_logit + strength * q - V is the logit of
    the hazard of the weights p exp(strength * q), and `gated_log_probs` of it is `weighted_log_probs`.

    Args:
        log_probs: As in `weighted_log_probs`.
        scores: As in `weighted_log_probs`.
        strength: As in `weighted_log_probs`.
        live: As in `weighted_log_probs`.

    Returns:
        Shape (B, K); 0 for the last candidate, which has none after it, and exactly 0 where all scores are 0.

    Source: f* = (Q - V_later) / beta, the residual form's optimum, with V the soft value of the later candidates.
    """
    base = log_probs.masked_fill(~live, -torch.inf)
    weights = base + strength * scores.masked_fill(~live, 0.0)
    tails = torch.stack([weights, base]).flip(-1).logcumsumexp(-1).flip(-1)  # (2, B, K): over each and all after it
    values = (tails[0, :, 1:] - tails[1, :, 1:]).nan_to_num(0.0)  # -inf - -inf: no candidate follows
    return pad(values, (0, 1))


def q_accept_logits(hazard_logits: Tensor, scores: Tensor, strength: Tensor | float, live: Tensor) -> Tensor:
    """Accept logits by the scores of Q-heads: hazard_logit + strength * q - V, see `tail_values`.

    Args:
        hazard_logits: Hazard logits of the base model, shape (B, K).
        scores: As in `weighted_log_probs`.
        strength: As in `weighted_log_probs`.
        live: As in `weighted_log_probs`.

    Returns:
        Shape (B, K); the hazard logits themselves where all scores are 0.
    """
    return hazard_logits + strength * scores - tail_values(gated_log_probs(hazard_logits, live), scores, strength, live)


def check_strength(form: HeadForm, gate: GateParams) -> None:
    """Refuse a strength other than 0 or 1 for heads without a dial.

    Raises:
        ConfigError: If a head of the paper's form gets a strength other than 0 or 1: its accept probability
            replaces the base model's instead of correcting it.
    """
    if form == "paper" and gate.strength not in (0.0, 1.0):
        raise ConfigError(
            f"strength={gate.strength!r} is not allowed: a 'paper' head is on (1) or off (0)",
            hint="heads of the 'residual', 'value' and 'q' form have a dial",
        )


def accept_logit(form: HeadForm, score: _Number, hazard_logit: _Number, strength: float) -> _Number:
    """Accept logit z of a candidate.

    Args:
        form: `paper` heads give z themselves; `residual` and `value` heads correct the base model's hazard, so that a
            score or strength of 0 gives exactly the base model.
        score: Output of `MARAHead.score`: l1 - l0 (`paper`), f (`residual`), V - V_prev (`value`).
        hazard_logit: Logit of the base model's hazard, see `Candidates.hazard_logits`.
        strength: Multiplies f; logits of several heads add.
    """
    return score if form == "paper" else hazard_logit + strength * score


class Verdict(NamedTuple):
    """A decision.

    Attributes:
        taken: Index of the candidate taken.
        num_visited: Number of candidates that the rule had to visit.
        accepted: False if all were rejected and the fallback was taken.
    """

    taken: int
    num_visited: int
    accepted: bool = True


def decide(
    accept_logits: Sequence[float], num_candidates: int, rule: Rule, fallback: Fallback, uniform: float
) -> Verdict | None:
    """Decide one position from the candidates visited so far; None: more have to be visited first.

    Args:
        accept_logits: Accept logits of the candidates visited, in visiting order.
        num_candidates: Number of all candidates.
        rule: `first`: the first with z > 0. `greedy`: the most probable under the gate's distribution, known as soon as
            no later one can win. `sample`: a draw from that distribution.
        fallback: With `first`, the rule for a position whose candidates are all rejected.
        uniform: The position's random number in [0, 1), for `sample`: the first k with P(taken <= k) > uniform.

    Source: Zhang et al. 2025 (arXiv 2505.19743), section 3, for `first`; chain rule over the decisions for the others.
    """
    last = num_candidates - 1
    if rule == "first":
        for k, z in enumerate(accept_logits):
            if z > 0:
                return Verdict(k, k + 1)
        if len(accept_logits) < num_candidates:
            return None
        best = max(range(num_candidates), key=accept_logits.__getitem__)
        return Verdict({"first": 0, "last": last, "best": best}[fallback], num_candidates, accepted=False)
    remaining, best, best_prob = 1.0, 0, 0.0  # remaining: probability that no candidate so far is taken
    for k, z in enumerate(accept_logits):
        accept, reject = (1.0, 0.0) if k == last else (_sigmoid(z), _sigmoid(-z))
        if remaining * accept > best_prob:
            best, best_prob = k, remaining * accept
        remaining *= reject
        if rule == "sample" and (k == last or 1.0 - remaining > uniform):
            return Verdict(k, k + 1)
        if rule == "greedy" and remaining <= best_prob:
            return Verdict(best, k + 1)
    return None


def _sigmoid(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))


def gated_log_probs(accept_logits: Tensor, live: Tensor) -> Tensor:
    """Log-probability of each candidate under the gate's sequential rule, the last live one forced.

    Args:
        accept_logits: Shape (B, K), in visiting order.
        live: Which columns are candidates, a prefix of each row, shape (B, K).

    Returns:
        Shape (B, K), in nats; -inf where not live.

    Source: log pi(k) = sum_{j<k} log sigmoid(-z_j) + log sigmoid(z_k).
    """
    last = torch.arange(live.shape[1], device=live.device) == live.sum(-1, keepdim=True) - 1
    accept = logsigmoid(accept_logits).masked_fill(last, 0.0)
    reject = logsigmoid(-accept_logits).masked_fill(~live, 0.0)
    before = reject.cumsum(-1) - reject
    return (before + accept).masked_fill(~live, -torch.inf)


def kl_to_base(accept_logits: Tensor, hazard_logits: Tensor, live: Tensor) -> Tensor:
    """KL(gate || base) of each position, shape (B,), in nats; arguments as in `gated_log_probs`."""
    gated, base = gated_log_probs(accept_logits, live), gated_log_probs(hazard_logits, live)
    gap = torch.where(live, gated - base, 0.0)
    return (gated.exp() * gap).sum(-1)
