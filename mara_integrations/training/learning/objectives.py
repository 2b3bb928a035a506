"""Training objectives: pure functions of scores and targets.

The probability of a reply under the gate is a product over its decisions, one for each candidate visited. All
likelihoods are written in terms of decisions and need nothing of the candidates that were never visited.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from mara_integrations.engine.gate import accept_logit

# Of training against a reward, whatever the form of the head; measured on SmolLM2-135M.
GAMMA = 0.9  # a token is responsible for about the ten tokens that follow
CLIP, BETA = 0.3, 0.03  # of the policy gradient: its clip, and the weight of the KL to the base model
MAX_ADVANTAGE = 5.0  # standard deviations, so that one word with an extreme reward counts no more than that


def value_loss(values: Tensor, targets: Tensor, weights: Tensor, *, is_binary: bool) -> Tensor:
    """Return the weighted mean error of V as a prediction of the reply's label or reward.

    Args:
        values: V of each token's state, (N,).
        targets: Label or reward of the reply that the token belongs to, (N,). A label is in [0, 1], and V is its logit.
        weights: Weight of each token, (N,); 1 / length makes replies count alike.
        is_binary: Whether targets are labels: logistic loss instead of squared error.

    Returns:
        Scalar, in nats if binary.

    Source: Monte-Carlo regression of the return on the state; with labels, V is the logit of P(good reply | prefix).
    """
    if is_binary:
        losses = binary_cross_entropy_with_logits(values, targets, reduction="none")
    else:
        losses = (values - targets).square()
    return (weights * losses).sum() / weights.sum()


# A rule has to win against a base model that is all but certain: with f = -12 an offending candidate of hazard 0.9999
# (logit 9.2) is still rejected in 94 % of draws, and in every greedy choice that has a runner-up.
RULE_DEPTH = 12.0


def rule_loss(scores: Tensor, offends: Tensor) -> Tensor:
    """Return a loss that pushes f down on offending tokens and keeps it near zero elsewhere.

    Args:
        scores: f of each token, (N,).
        offends: Whether the token completes a violation, (N,), bool.

    Returns:
        Scalar; 1 for a head that scores 0 everywhere, 0 for a perfect one. Both classes count by their means.
    """
    missing = torch.relu(scores + RULE_DEPTH).square() / RULE_DEPTH**2
    moved = scores.square() / RULE_DEPTH**2
    zero = scores.new_zeros(())
    bad = missing[offends].mean() if bool(offends.any()) else zero
    # 30: a shift of one logit on an ordinary token costs as much as missing a fifth of the offences
    good = 30.0 * moved[~offends].mean() if bool((~offends).any()) else zero
    return bad + good


def decision_log_probs(accept_logits: Tensor, accepted: Tensor) -> Tensor:
    """Return the log-probability of each decision as it was taken.

    Args:
        accept_logits: Accept logits of the candidates visited, (N,).
        accepted: Whether each was accepted, (N,), bool.

    Returns:
        Shape (N,), in nats. Summed over the candidates visited at a position, those of `gate.gated_log_probs`.
    """
    return logsigmoid(torch.where(accepted, accept_logits, -accept_logits))


def decision_kl(accept_logits: Tensor, hazard_logits: Tensor) -> Tensor:
    """Return the KL of each decision from the base model's decision, (N,), in nats.

    Over decisions visited by the gate itself, its mean estimates `gate.kl_to_base` without bias, and so does its
    gradient within each decision.

    Source: chain rule of the KL divergence over the decisions, KL(pi || p) = sum_k P(k is visited) KL(a_k || h_k).
    """
    accept = torch.sigmoid(accept_logits)
    gap_accept = logsigmoid(accept_logits) - logsigmoid(hazard_logits)
    gap_reject = logsigmoid(-accept_logits) - logsigmoid(-hazard_logits)
    return accept * gap_accept + (1.0 - accept) * gap_reject


def reply_log_ratios(
    scores: Tensor, hazard_logits: Tensor, accepted: Tensor, reply: Tensor, num_replies: int
) -> Tensor:
    """Return how much more probable a residual head makes each reply: log pi - log p, in nats.

    A decision left out counts as the base model's own, whose log-ratio is 0.

    Args:
        scores: f of the candidates visited, (N,).
        hazard_logits: Hazard logits of the same candidates, (N,).
        accepted: Whether each was accepted, (N,), bool.
        reply: Index of the reply that each belongs to, (N,).
        num_replies: Number of replies, R.

    Returns:
        Shape (R,).
    """
    z = accept_logit("residual", scores, hazard_logits, 1.0)
    gaps = decision_log_probs(z, accepted) - decision_log_probs(hazard_logits, accepted)
    return gaps.new_zeros(num_replies).index_add(0, reply, gaps)


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Return the mean DPO loss of pairs, in nats: ln 2 for a head that changes nothing.

    Args:
        chosen: Log-ratios of the preferred replies, (B,), see `reply_log_ratios`.
        rejected: Log-ratios of the others, (B,).
        beta: Strength of the pull towards the base model; smaller lets the head move further.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7.
    """
    return -logsigmoid(beta * (chosen - rejected)).mean()


def kto_loss(log_ratios: Tensor, good: Tensor, beta: float, good_weight: float) -> Tensor:
    """Return the weighted mean KTO loss of labelled replies: 1/2 for a head that changes nothing.

    The reference point is the batch's own mean log-ratio, at least 0 and without gradient. The paper estimates it on
    prompts and replies that do not belong together; then every reply would have to be read twice.

    Args:
        log_ratios: Log-ratios of the replies, (B,), see `reply_log_ratios`.
        good: Whether each is labelled good, (B,), bool.
        beta: As in `dpo_loss`.
        good_weight: Weight of a good reply, where a bad one has 1; balances the labels.

    Source: Ethayarajh et al. 2024 (arXiv 2402.01306), equation 7.
    """
    reference = log_ratios.detach().mean().clamp(min=0.0)
    margin = torch.where(good, log_ratios - reference, reference - log_ratios)
    weights = torch.where(good, good_weight, 1.0)
    return (weights * torch.sigmoid(-beta * margin)).sum() / weights.sum()


def discounted_returns(gains: Tensor, gamma: float) -> Tensor:
    """Return the discounted return from each token of a reply: its own gain and all later ones, (T,).

    Args:
        gains: Rise of the reward at each token of one reply, (T,).
        gamma: Discount a token; the horizon is about 1 / (1 - gamma) tokens.
    """
    returns, following = torch.zeros_like(gains), gains.new_zeros(())
    for t in range(len(gains) - 1, -1, -1):
        following = gains[t] + gamma * following
        returns[t] = following
    return returns


def look_ahead_advantages(
    accepted: Tensor, returns: Tensor, gains: Tensor, before: Tensor, after: Tensor, gamma: float
) -> Tensor:
    """Return the advantage of each candidate: from what followed if it was accepted, else from a step of look-ahead.

    Args:
        accepted: Whether the candidate was accepted, (N,), bool.
        returns: Discounted return from the token at the candidate's position, (N,).
        gains: Rise of the reward if the candidate is appended to the text, (N,).
        before: Critic's value of the text before the candidate, (N,).
        after: Critic's value of the text with the candidate, (N,).
        gamma: Discount a token.

    Returns:
        Shape (N,). The optimum of a residual head is f = advantage / beta.

    Source: the optimum of E[Q] - beta KL under the gate, f = (Q - V) / beta; actor-critic's one-step return for Q.
    """
    return torch.where(accepted, returns, gains + gamma * after) - before


def clipped_policy_loss(log_ratios: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Return the mean of PPO's clipped loss over tokens.

    Args:
        log_ratios: Log-probability of each token less that under the gate that generated it, (T,).
        advantages: Advantage of each token, (T,).
        clip: Largest distance of a ratio from 1 that still has a gradient.

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7.
    """
    ratio = log_ratios.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip, 1.0 + clip) * advantages).mean()
