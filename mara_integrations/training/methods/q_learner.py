"""Rounds on Q-heads, whatever they learn from. The distribution of the gate is known everywhere, and so its KL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol, TypeVar

from typing_extensions import override

from mara_integrations.heads.q import QHead
from mara_integrations.training.collect.workload import Generation
from mara_integrations.training.context import Run
from mara_integrations.training.methods.rounds import BestRound, Learner, PromptSide
from mara_integrations.training.rollouts.positions import Positions, all_scores
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.scoring.greedy import greedy_generations, hold_greedy_quality
from mara_integrations.training.scoring.q_scale import hold_sampled_quality, kl_per_token, scale_within_budget


class WithPositions(Protocol):
    """Replies of a round with the positions that they went through."""

    @property
    def generated(self) -> list[Reply]:
        """All replies."""

    @property
    def positions(self) -> Positions:
        """Positions that the KL is measured at, with all candidates."""


WithPositionsT = TypeVar("WithPositionsT", bound=WithPositions)


class QHeadLearner(Learner[WithPositionsT]):
    """Fits Q-heads; the gated model's greedy replies are learned from too."""

    stages: ClassVar[Mapping[str, float]] = {"sampled gated replies": 1.0, "greedy gated replies": 0.0}

    @property
    def q_head(self) -> QHead:
        """The head."""
        assert isinstance(self.head, QHead)
        return self.head

    @override
    def scale_within_budget(self, experience: WithPositionsT, sampled_at: float = 0.0) -> float:
        return scale_within_budget(self.run, self.q_head, experience.positions)

    @override
    def kl_per_token(self, experience: WithPositionsT, sampled_at: float) -> float:
        scores = all_scores(self.q_head, experience.positions, self.run.backend.output_embeddings)
        return kl_per_token(experience.positions, scores, self.head.config.scale)

    @override
    @classmethod
    def checked_at_the_end(cls, run: Run, held_out: PromptSide) -> list[Generation]:
        return greedy_generations(run, held_out.prompts, held_out.seed)

    @override
    def hold_quality(self, held_out: PromptSide, base: WithPositionsT, best: BestRound[WithPositionsT]) -> None:
        hold_sampled_quality(self.run, self.q_head, best.scale, base.generated, best.held_out.generated)
        hold_greedy_quality(self.run, self.q_head, held_out.prompts, held_out.seed)
