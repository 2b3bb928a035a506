"""The method `rloo` on Q-heads: q of every candidate is learned, taken or not, for one forward a token.

A reward that scores partial text tells what each candidate of each position changes at once; a critic, see `q_critic`,
tells what follows it. q is fitted to the advantage of every candidate. Rewards of whole replies are compared among
replies to the same prompt (leave one out), in a policy gradient on the gate's distribution, which is known in closed
form. See `rounds` for what happens around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.training.collect.workload import Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.learning.fit import Rows, fit
from mara_integrations.training.learning.objectives import (
    BETA,
    CLIP,
    GAMMA,
    clipped_policy_loss,
)
from mara_integrations.training.learning.q_objectives import (
    mean_kl,
    taken_log_ratios,
)
from mara_integrations.training.methods.q_critic import (
    NUM_SCORED,
    ScoredPositions,
    candidate_advantages,
    scored_parts,
)
from mara_integrations.training.methods.q_learner import QHeadLearner
from mara_integrations.training.methods.q_regression import regress, standardised
from mara_integrations.training.methods.reward_rounds import (
    Experience,
    RewardLearner,
    train_on_reward,
    work_on_reward,
)
from mara_integrations.training.methods.rounds import PromptSide
from mara_integrations.training.methods.value import advantages
from mara_integrations.training.rollouts.positions import Positions, all_scores, q_scores
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.scoring.partial_rewards import uses_partial_text


@dataclass(frozen=True, slots=True)
class PositionExperience(Experience):
    """Replies with the positions that they went through.

    Attributes:
        positions: Positions of the replies with a reward, with all candidates.
        scored: The same positions with the candidates that were scored alone.
        gains: By how much each of these raises the reward, (P, K); empty where whole replies are scored.
        returns: Discounted return of the token taken at each position, (P,); empty where whole replies are scored.
    """

    positions: Positions
    scored: Positions
    gains: Tensor
    returns: Tensor


@dataclass(frozen=True, slots=True)
class Episodes(Rows):
    """Positions of whole replies to learn from.

    Attributes:
        positions: P positions.
        advantages: Advantage of the reply that each belongs to, (P,).
        sampled: Log-ratio of the token taken, gate over base, when the replies were sampled, (P,).
    """

    positions: Positions
    advantages: Tensor
    sampled: Tensor


class QLearner(QHeadLearner[PositionExperience], RewardLearner[PositionExperience]):
    """Fits Q-heads to rewards."""

    @override
    def score_parts(self, side: PromptSide, replies: Sequence[Reply], rewards: Sequence[float]) -> dict[str, Any]:
        return scored_parts(self.run, side.data, side.prompts, replies, rewards)

    @override
    def experience(self, scored: Experience, parts: Mapping[str, Any] | None) -> PositionExperience:
        gains, returns = (parts["gains"], parts["returns"]) if parts is not None else (torch.zeros(0), torch.zeros(0))
        where = Positions.of(scored.replies)
        narrowed = where.narrowed(NUM_SCORED)
        return PositionExperience(scored.generated, scored.replies, scored.rewards, where, narrowed, gains, returns)

    @override
    def fit_parts(
        self, name: str, rounds: Sequence[PositionExperience], held_out_rounds: Sequence[PositionExperience]
    ) -> None:
        """Fit q to the advantage of each candidate: its own gain, and what a critic says that follows it."""
        sides = [
            ScoredPositions(
                Positions.join([each.scored for each in side]),
                torch.cat([each.gains for each in side]),
                torch.cat([each.returns for each in side]),
                GAMMA,
            )
            for side in (rounds, held_out_rounds)
        ]
        positions = [side.positions for side in sides]
        values = candidate_advantages(self.run, name, sides)
        regress(self.run, name, self.q_head, *standardised(positions, values))

    @override
    def fit_whole(self, name: str, train: PositionExperience, held_out: PositionExperience) -> None:
        """Fit q by the clipped policy gradient, with the KL to the base model as a penalty."""
        embeddings, scale = self.run.backend.output_embeddings, self.head.config.scale
        assert len(train.positions) and len(held_out.positions), "replies with a choice"

        def episodes_of(each: PositionExperience) -> Episodes:
            of_replies = torch.tensor(advantages(each.replies, each.rewards))
            scores, where = all_scores(self.q_head, each.positions, embeddings), each.positions
            sampled = taken_log_ratios(scores, where.log_probs, where.taken, scale)
            return Episodes(where, of_replies[where.replies], sampled)

        def loss(head: MARAHead, episodes: Episodes) -> Tensor:
            assert isinstance(head, QHead)
            where = episodes.positions
            scores = q_scores(head, where.states, where.token_ids, embeddings)
            ratios = taken_log_ratios(scores, where.log_probs, where.taken, scale) - episodes.sampled
            penalty = BETA * mean_kl(scores, where.log_probs, scale)
            return clipped_policy_loss(ratios, episodes.advantages, CLIP) + penalty

        with self.run.fitting(name) as on_epoch:
            fit(self.head, episodes_of(train), episodes_of(held_out), loss, self.run.fit_settings(5e-4), on_epoch)


def train(run: Run, head: MARAHead) -> MethodResult:
    """Train the head against the run's reward."""
    return train_on_reward(QLearner(run, head))


def work(run: Run) -> Workload:
    """Return what `train` will do."""
    return work_on_reward(run, QLearner, is_partial=uses_partial_text(run))
