"""Credit assignment: the immediate reward of each decision of a reply, which `sac` learns from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mara_integrations.training.rollouts.decisions import Decisions


def terminal_credit(decisions: Decisions, rewards: Sequence[float]) -> Tensor:
    """Give the reward of a reply to its last decision, (N,)."""
    credit = torch.zeros(len(decisions.states))
    has_any = decisions.counts > 0
    credit[decisions.counts.cumsum(0)[has_any] - 1] = torch.tensor(rewards, dtype=torch.float32)[has_any]
    return credit


def postback_credit(decisions: Decisions, rewards: Sequence[float], gamma: float) -> Tensor:
    """Give the reward of a reply to all its decisions, discounted once for each token accepted in between, (N,).

    Args:
        decisions: Decisions of R replies.
        rewards: Reward of each reply, length R.
        gamma: Discount.
    """
    credit = torch.zeros(len(decisions.states))
    for rows, reward in zip(torch.arange(len(credit)).split(decisions.counts.tolist()), rewards, strict=True):
        if len(rows) == 0:
            continue
        accepts = decisions.accepted[rows].flip(0).float()
        accepts[0] = 0.0  # the last decision gets the reward undiscounted
        credit[rows] = reward * gamma ** accepts.cumsum(0).flip(0)
    return credit


def prefix_credit(decisions: Decisions, rewards: Sequence[Sequence[float]]) -> Tensor:
    """Give the decision that settled a token what the reward rose by until the next decided token, (N,).

    The sum over a reply is its reward less that of the text before its first decided token.

    Args:
        decisions: Decisions of R replies.
        rewards: Rewards of each reply's text after 0, 1, ... T of its T tokens, T + 1 numbers a reply.
    """
    credit = torch.zeros(len(decisions.states))
    for rows, of_prefix in zip(torch.arange(len(credit)).split(decisions.counts.tolist()), rewards, strict=True):
        tokens = decisions.tokens[rows]
        settles = torch.ones(len(rows), dtype=torch.bool)
        settles[:-1] = tokens[1:] != tokens[:-1]
        starts = [*tokens[settles].tolist(), len(of_prefix) - 1]
        credit[rows[settles]] = torch.tensor([of_prefix[t] for t in starts]).diff()
    return credit
