"""What each decision of a reply gets of the reply's worth: the immediate rewards that `sac` learns from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mara_integrations.engine.gate import gated_log_probs
from mara_integrations.heads.afterstate import AfterstateHead
from mara_integrations.training.rollouts.decisions import Decisions
from mara_integrations.training.rollouts.replies import Reply


def terminal_credit(decisions: Decisions, worth: Sequence[float]) -> Tensor:
    """The worth of a reply to its last decision, (N,)."""
    rewards = torch.zeros(len(decisions.states))
    has_any = decisions.counts > 0
    rewards[decisions.counts.cumsum(0)[has_any] - 1] = torch.tensor(worth, dtype=torch.float32)[has_any]
    return rewards


def postback_credit(decisions: Decisions, worth: Sequence[float], gamma: float, *, spare_first: bool = False) -> Tensor:
    """The worth of a reply to every decision of it, discounted once for each token accepted in between, (N,).

    Args:
        decisions: Of replies.
        worth: Of each reply.
        gamma: Discount.
        spare_first: The first decision of a reply gets nothing, as in the paper's code (distri_executor.py, `update`,
            whose loop stops before index 0).
    """
    rewards = torch.zeros(len(decisions.states))
    for rows, value in zip(torch.arange(len(rewards)).split(decisions.counts.tolist()), worth, strict=True):
        if len(rows) == 0:
            continue
        accepts = decisions.accepted[rows].flip(0).float()
        accepts[0] = 0.0  # the last decision gets the worth itself
        rewards[rows] = value * gamma ** accepts.cumsum(0).flip(0)
        if spare_first and len(rows) > 1:
            rewards[rows[0]] = 0.0
    return rewards


def prefix_credit(decisions: Decisions, worth: Sequence[Sequence[float]]) -> Tensor:
    """What the text gained until the next decided token, to the decision that settled a token, (N,).

    The sum over a reply is the worth of the whole less that of the text before its first decided token.

    Args:
        decisions: Of replies.
        worth: Of each reply's text after 0, 1, ... T of its T tokens, T + 1 numbers.
    """
    rewards = torch.zeros(len(decisions.states))
    for rows, values in zip(torch.arange(len(rewards)).split(decisions.counts.tolist()), worth, strict=True):
        tokens = decisions.tokens[rows]
        settles = torch.ones(len(rows), dtype=torch.bool)
        settles[:-1] = tokens[1:] != tokens[:-1]
        starts = [*tokens[settles].tolist(), len(values) - 1]
        at = torch.tensor([values[t] for t in starts])
        rewards[rows[settles]] = at.diff()
    return rewards


@torch.inference_mode()
def published_kl(head: AfterstateHead, replies: Sequence[Reply], weight: float) -> Tensor:
    """The paper's code's "KL" reward of each decision, forced ones included, (N,).

    Its log-probability of a candidate is a log_softmax over the probabilities, and the base model's is that after a
    temperature of 0.8, so that the reward comes to weight * log p / 0.8 and nearly a constant; rejected candidates get
    theirs as well. Two details differ here, for what was never visited is not known: p is renormalised over the
    candidates, and each unvisited candidate counts in the log_softmax with an equal share of the probability left,
    which moves the reward by less than weight * ln((K - 1 + e) / K).

    Args:
        head: That wrote the replies; of the paper's form.
        replies: Sampled with it, their positions kept.
        weight: `--kl_ctl`.

    Source: SAC.py, `explore_with_env` and `_kl_penalty`, with `--cond_prob --kl_penalty kl` as its scripts set them.
    """
    rewards = [torch.zeros(0)]
    for reply in replies:
        for position in reply.positions:
            visited = position.token_ids.index(reply.token_ids[position.index]) + 1
            states = position.states[:visited]
            z = head.score(states, position.previous.expand_as(states)).cpu()
            # one more column stands for the candidates that were not visited, and takes what is left
            gated = gated_log_probs(torch.cat([z, z[-1:]])[None], torch.ones(1, visited + 1, dtype=torch.bool))[0].exp()
            hazards = torch.tensor(position.hazard_logits)
            base = gated_log_probs(hazards[None], torch.ones(1, len(hazards), dtype=torch.bool))[0, :visited]
            unvisited = len(hazards) - visited
            spread = gated[:-1].exp().sum() + (unvisited * (gated[-1] / unvisited).exp() if unvisited else 0.0)
            rewards.append(-weight * (gated[:-1] - spread.log() - base / 0.8))
    return torch.cat(rewards)
