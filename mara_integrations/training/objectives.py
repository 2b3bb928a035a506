"""What heads are trained to do: pure functions of scores and targets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def value_loss(values: Tensor, targets: Tensor, weights: Tensor, *, is_binary: bool) -> Tensor:
    """How far V is from what the reply turned out to be worth, at every token of it.

    Args:
        values: V of each token's state, (N,).
        targets: Worth of the reply the token belongs to, (N,): in [0, 1] if binary (V is its logit), else any number.
        weights: Of each token, (N,); 1 / length makes replies count alike.
        is_binary: Logistic instead of squared error.

    Returns:
        Scalar, in nats if binary.

    Source: Monte-Carlo regression of the return on the state; for labels logistic, which is P(good reply | prefix).
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
    """Push f down on offending tokens, and keep it near zero elsewhere so that the base model stays as it is.

    Args:
        scores: f of each token, (N,).
        offends: Whether the token breaks the rule, (N,), bool.

    Returns:
        Scalar; 1 where nothing is learnt, 0 where all is as it should be. Each class counts by its mean, however rare.
    """
    short = torch.relu(scores + RULE_DEPTH).square() / RULE_DEPTH**2
    moved = scores.square() / RULE_DEPTH**2
    zero = scores.new_zeros(())
    bad = short[offends].mean() if bool(offends.any()) else zero
    # 30: a shift of one logit on an ordinary token costs as much as missing a fifth of the offences
    good = 30.0 * moved[~offends].mean() if bool((~offends).any()) else zero
    return bad + good
