"""What Q-heads are trained to do: pure functions of scores of all candidates of a position.

Positions are rows, candidates columns; where there is no candidate, the log-probability is -inf. The law of the gate is
known in closed form, so that likelihoods, their ratios to the base model and the KL are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mara_integrations.engine.gate import weighted_kl, weighted_log_probs

# A candidate counts in a regression by its probability under the base model, but at least by this much: what is rare
# there may be frequent under the gate.
_LEAST_WEIGHT = 0.02


def centred(values: Tensor, log_probs: Tensor) -> Tensor:
    """Values of candidates less their mean under the base model, (P, K); 0 where there is no candidate.

    Args:
        values: Shape (P, K).
        log_probs: Log-probabilities of the candidates, -inf where there is none, shape (P, K).
    """
    live = log_probs.isfinite()
    values = values.masked_fill(~live, 0.0)
    return (values - (log_probs.softmax(-1) * values).sum(-1, keepdim=True)).masked_fill(~live, 0.0)


def soft_values(values: Tensor, log_probs: Tensor, strength: float) -> Tensor:
    """Return the soft value of each position, log E_p exp(strength * value) / strength, (P,).

    This is the best expected value less KL / strength that a gate can reach. At strength 0 it is E_p value, the
    expected value under the base model.

    Args:
        values: Value of each candidate, (P, K).
        log_probs: Log-probabilities of the candidates, -inf where there is none, (P, K).
        strength: Strength of the gate, per unit of value; at least 0.

    Source: Haarnoja et al. 2017, arXiv 1702.08165; the base model is the prior.
    """
    live = log_probs.isfinite()
    values, log_probs = values.masked_fill(~live, 0.0), log_probs.log_softmax(-1)
    if strength == 0.0:
        return (log_probs.exp() * values).sum(-1)
    return (log_probs + strength * values).logsumexp(-1) / strength


def next_rows(replies: Tensor) -> Tensor:
    """Return the row of the next position of the same reply, -1 for the last one; (P,).

    Args:
        replies: The reply of each position, reply by reply, (P,).
    """
    rows = torch.arange(1, len(replies) + 1)
    rows[-1:] = -1
    return rows.where(replies == replies.roll(-1), -1)


def score_loss(scores: Tensor, targets: Tensor, log_probs: Tensor) -> Tensor:
    """Mean squared error of scores, weighted by the candidates' probabilities under the base model; a scalar.

    Args:
        scores: q of candidates, (P, K).
        targets: What q is to be, (P, K).
        log_probs: Log-probabilities of the candidates, -inf where there is none or no target is known, (P, K).
    """
    live = log_probs.isfinite()
    weights = log_probs.softmax(-1).clamp_min(_LEAST_WEIGHT).masked_fill(~live, 0.0)
    return (weights * (scores - targets).square()).sum() / weights.sum()


def taken_log_ratios(scores: Tensor, log_probs: Tensor, taken: Tensor, strength: float) -> Tensor:
    """Return how much more probable the gate makes the token taken than the base model does, (P,), in nats.

    Args:
        scores: q of all candidates, (P, K).
        log_probs: Log-probabilities of the candidates, -inf where there is none, (P, K).
        taken: Column of the token taken, (P,).
        strength: Multiplies q.
    """
    gated = weighted_log_probs(log_probs, scores, strength, log_probs.isfinite())
    return (gated - log_probs).gather(1, taken[:, None])[:, 0]


def mean_kl(scores: Tensor, log_probs: Tensor, strength: float) -> Tensor:
    """Mean KL(gate || base) of positions, a scalar in nats; arguments as in `taken_log_ratios`."""
    return weighted_kl(log_probs, scores, strength, log_probs.isfinite()).mean()


def divergence_loss(scores: Tensor, log_probs: Tensor, wanted: Tensor) -> Tensor:
    """Mean KL of positions from a wanted distribution to that of the gate, a scalar in nats.

    Args:
        scores: q of all candidates, (P, K).
        log_probs: Log-probabilities of the candidates, -inf where there is none, (P, K).
        wanted: Log-probabilities that the gate should give them; -inf for one that it should never take, (P, K).
    """
    gated = weighted_log_probs(log_probs, scores, 1.0, log_probs.isfinite())
    return (wanted.exp() * torch.where(wanted.isfinite(), wanted - gated, 0.0)).sum(-1).mean()


def compliant(log_probs: Tensor, offends: Tensor) -> Tensor:
    """Log-probabilities of the base model without its offending candidates, (P, K).

    Where all candidates offend, they stay as they are: the gate has nothing else to choose from.

    Args:
        log_probs: Log-probabilities of the candidates, -inf where there is none, (P, K).
        offends: Which candidates break the rule, (P, K), bool.
    """
    live = log_probs.isfinite()
    allowed = live & (~offends | (offends | ~live).all(-1, keepdim=True))
    return log_probs.masked_fill(~allowed, -torch.inf).log_softmax(-1)
