"""The critic of `q_rewards`: a Q-head that estimates the discounted reward after each candidate of a position.

The first pass fits it to the returns of the replies, which are noisy: each holds one continuation. Every later pass
fits it to the soft value of the next position. That value averages over all candidates there. It adds their gains,
which are known, to the previous pass's estimate of the reward after them. It assumes that the gate, not the base model,
chooses among them.

Source: fitted Q iteration, Ernst et al. 2005; its soft form as in Haarnoja et al. 2017 (arXiv 1702.08165).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mara_integrations.data import Dataset
from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.q import QHead
from mara_integrations.messages import Conversation
from mara_integrations.training.context import Run
from mara_integrations.training.learning.fit import Targets
from mara_integrations.training.learning.objectives import GAMMA, discounted_returns
from mara_integrations.training.learning.q_objectives import centred, next_rows, soft_values
from mara_integrations.training.methods.q_regression import regress
from mara_integrations.training.rollouts.positions import Positions, all_scores
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.scoring.partial_rewards import position_gains, prefix_rewards
from mara_integrations.training.scoring.q_scale import kl_per_token
from mara_integrations.training.scoring.scale import largest_within

_PASSES = 4
# Candidates of a position that are scored: those after them have 3 % of the probability together. The one taken counts
# wherever it stands.
NUM_SCORED = 12


@dataclass(frozen=True, slots=True)
class ScoredPositions:
    """Positions of replies with what the reward says of their candidates.

    Attributes:
        positions: P positions, reply by reply.
        gains: By how much each candidate raises the reward, (P, K).
        returns: Discounted return of the token taken, (P,).
        gamma: The discount a token.
    """

    positions: Positions
    gains: Tensor
    returns: Tensor
    gamma: float

    @property
    def taken_gains(self) -> Tensor:
        """Gain of the token taken, (P,)."""
        return self.gains.gather(1, self.positions.taken[:, None])[:, 0]

    def returns_through(self, values: Tensor) -> Tensor:
        """Return the returns, (P,), with `values`, (P,), in place of the return at the reply's next position."""
        following = next_rows(self.positions.replies)
        is_last, following = following < 0, following.clamp_min(0)
        distance = (self.positions.places[following] - self.positions.places).clamp_min(0)
        change = self.gamma**distance * (values - self.returns)[following]
        return self.returns + change.masked_fill(is_last, 0.0)


def scored_parts(
    run: Run, data: Dataset, prompts: Sequence[Conversation], replies: Sequence[Reply], rewards: Sequence[float]
) -> dict[str, Tensor]:
    """Score unfinished replies, and return `gains` and `returns` of `ScoredPositions` as plain data.

    Args:
        run: A run with a reward.
        data: Rows of the prompts.
        prompts: The prompts that `Reply.prompt_index` counts.
        replies: R replies.
        rewards: Rewards of the whole replies, length R.
    """
    prefixes = prefix_rewards(run, data, prompts, replies, rewards)
    gains = position_gains(run, data, prompts, replies, prefixes, Positions.of(replies).narrowed(NUM_SCORED))
    returns = [discounted_returns(torch.tensor(of_reply).diff(), GAMMA) for of_reply in prefixes]
    at_positions = [
        of_reply[[position.index for position in reply.positions]]
        for of_reply, reply in zip(returns, replies, strict=True)
    ]
    return {"gains": gains, "returns": torch.cat(at_positions)}


def candidate_advantages(run: Run, name: str, sides: Sequence[ScoredPositions]) -> list[Tensor]:
    """Return by how much each candidate is worth more than the base model's choice, (P, K) a side.

    Arguments as in `action_values`.
    """
    values = action_values(run, name, sides)
    return [centred(of_side, side.positions.log_probs) for of_side, side in zip(values, sides, strict=True)]


def action_values(run: Run, name: str, sides: Sequence[ScoredPositions]) -> list[Tensor]:
    """Return the value of each candidate of each position: its gain plus the critic's estimate, (P, K) a side.

    Args:
        run: The run.
        name: Name of the fit.
        sides: What to fit the critic on, and what is held out.
    """
    critic, embeddings = _new_critic(run), run.backend.output_embeddings
    returns, values = [side.returns for side in sides], [side.gains for side in sides]
    for number in range(1, _PASSES + 1):
        following = [of_taken - side.taken_gains for of_taken, side in zip(returns, sides, strict=True)]
        deviation = float(following[0].std()) or 1.0
        targets = [
            Targets(side.positions.only_taken(), of_taken[:, None] / deviation)
            for side, of_taken in zip(sides, following, strict=True)
        ]
        regress(run, f"{name}, critic {number}", critic, *targets)
        values = [side.gains + deviation * all_scores(critic, side.positions, embeddings) for side in sides]
        if number < _PASSES:
            strength = _strength_within_budget(run, sides[1].positions, values[1])
            returns = [
                side.returns_through(soft_values(of_side, side.positions.log_probs, strength))
                for side, of_side in zip(sides, values, strict=True)
            ]
    return [
        of_side.scatter(1, side.positions.taken[:, None], of_taken[:, None])
        for side, of_side, of_taken in zip(sides, values, returns, strict=True)
    ]


def _strength_within_budget(run: Run, positions: Positions, values: Tensor) -> float:
    """Return the strength, per unit of reward, at which a gate by these values spends the KL budget."""
    assert run.kl_budget is not None, "methods that train against a reward have a budget"
    advantages = centred(values, positions.log_probs)
    deviation = float(advantages[positions.live].std()) or 1.0
    among = replace(positions, log_probs=positions.log_probs.log_softmax(-1))
    return largest_within(lambda scale: kl_per_token(among, advantages / deviation, scale), run.kl_budget) / deviation


def _new_critic(run: Run) -> QHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.config.seed)
        return QHead(HeadConfig(form="q", hidden_size=run.model.hidden_size)).to(run.model.device)
