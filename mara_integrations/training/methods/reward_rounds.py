"""Rounds of training against a reward, see `rounds`: it scores the replies, and their mean measures a round.

How a head learns from scored replies depends on its form: a `RewardLearner` does that.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from typing_extensions import override

from mara_integrations.heads.head import MARAHead
from mara_integrations.rewards import Reward, reward_name
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import limited_prompts, replies_per_prompt
from mara_integrations.training.collect.rewards import check_differ, report_mean, score_replies, with_opinion
from mara_integrations.training.collect.workload import Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.methods.rounds import (
    HELD_OUT_SEED,
    Learner,
    PlannedRounds,
    PromptSide,
    train_in_rounds,
)
from mara_integrations.training.records.store import load_or_compute
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.scoring.held_out import compare_held_out, report_comparison
from mara_integrations.training.scoring.partial_rewards import uses_partial_text

_ROUNDS, _REPLIES_PER_PROMPT = 2, 4  # defaults where whole replies are scored


@dataclass(frozen=True, slots=True)
class Experience:
    """Replies of one round to the prompts of one side, with their rewards. A learner adds what its heads learn from.

    Attributes:
        generated: All replies.
        replies: The R replies that the reward has an opinion on.
        rewards: Their rewards, length R.
    """

    generated: list[Reply]
    replies: list[Reply]
    rewards: list[float]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the replies with a reward."""
        return sum(len(reply.token_ids) for reply in self.replies)


ExperienceT = TypeVar("ExperienceT", bound=Experience)


class RewardLearner(Learner[ExperienceT]):
    """Fits heads of one form to rounds of scored replies.

    Args:
        run: A run with a reward.
        head: An untrained head of that form; it is fitted in place.
        rewards: Rewards to report, by name; the first one is the run's. None is that one alone.
    """

    def __init__(self, run: Run, head: MARAHead, rewards: Mapping[str, Reward] | None = None) -> None:
        super().__init__(run, head)
        if rewards is None:
            assert run.plan.reward is not None
            rewards = {reward_name(run.plan.reward): run.plan.reward}
        self.trained_on = next(iter(rewards))
        self.rewards = {**rewards, **run.plan.judges}

    @abstractmethod
    def score_parts(self, side: PromptSide, replies: Sequence[Reply], rewards: Sequence[float]) -> dict[str, Any]:
        """Score unfinished replies, and return plain data that `experience` takes.

        Args:
            side: The prompts of the replies.
            replies: R replies.
            rewards: Rewards of the whole replies, length R.
        """

    @abstractmethod
    def experience(self, scored: Experience, parts: Mapping[str, Any] | None) -> ExperienceT:
        """Return what the head learns from; `parts` is what `score_parts` returned, None where it was not called."""

    @abstractmethod
    def fit_parts(self, name: str, rounds: Sequence[ExperienceT], held_out_rounds: Sequence[ExperienceT]) -> None:
        """Fit the head to rewards of unfinished replies, of all rounds so far."""

    @abstractmethod
    def fit_whole(self, name: str, train: ExperienceT, held_out: ExperienceT) -> None:
        """Fit the head to rewards of whole replies, of the last round."""

    @override
    def gather(
        self, stage: str, side: PromptSide, head: MARAHead, *, is_base: bool = False, temperature: float = 1.0
    ) -> ExperienceT:
        """Generate replies and score them; both are stored. Replies the reward has no opinion on are left out."""
        run, is_partial = self.run, uses_partial_text(self.run)
        generated = generate_replies(
            run, stage, side.prompts, side.replies_per_prompt, side.seed, head, is_base=is_base, temperature=temperature
        )

        def scored() -> dict[str, Any]:
            scores = score_replies(run, side.data, side.prompts, generated)
            replies, rewards = map(list, zip(*with_opinion(stage, generated, scores), strict=True))
            parts = self.score_parts(side, replies, rewards) if is_partial else {}
            return {"indices": [i for i, value in enumerate(scores) if value is not None], "rewards": rewards, **parts}

        data, _ = load_or_compute(run.stored(f"rewards of {stage}"), scored)
        report_mean(run, stage, len(generated), data["rewards"])
        replies = [generated[i] for i in data["indices"]]
        return self.experience(Experience(generated, replies, data["rewards"]), data if is_partial else None)

    @override
    def fit(self, name: str, rounds: Sequence[ExperienceT], held_out_rounds: Sequence[ExperienceT]) -> None:
        check_differ(rounds[0].rewards)
        if uses_partial_text(self.run):
            self.fit_parts(name, rounds, held_out_rounds)
        else:
            self.fit_whole(name, rounds[-1], held_out_rounds[-1])

    @override
    def gain(self, name: str, held_out: PromptSide, base: ExperienceT, gated: ExperienceT) -> float:
        """Return by how much the mean reward is higher; see `Learner.gain`."""
        comparison = compare_held_out(
            self.run, self.rewards, held_out.data, held_out.prompts, base.generated, gated.generated, self.head
        )
        report_comparison(self.run, name, comparison)
        # by name: a judge, which is only to report, must not choose among rounds
        change = comparison.rewards.get(self.trained_on)
        if change is None or change.difference.low <= 0:
            self.run.say(
                "  [yellow]by this reward held-out replies are not shown to be better than those of the base model: it "
                "may hardly depend on the replies, or more of them are needed (--max-replies)[/]"
            )
        return change.difference.mean if change is not None else -math.inf


def train_on_reward(learner: RewardLearner[ExperienceT]) -> MethodResult:
    """Train a head against the reward of the run's plan.

    Raises:
        DataError: If the reward has no opinion, or the same of all replies.
    """
    run, is_partial = learner.run, uses_partial_text(learner.run)
    if not is_partial:
        run.say("  the reward scores whole replies; if it can score unfinished ones, --partial-text learns much more")
    kl, _ = train_in_rounds(learner, prompt_sides(run, is_partial), num_rounds(run, is_partial))
    return MethodResult(rewards=learner.rewards, kl_per_token=kl)


def work_on_reward(run: Run, learner: type[RewardLearner[ExperienceT]], *, is_partial: bool) -> Workload:
    """Return what `train_on_reward` will do if no round ends it early."""
    rounds = num_rounds(run, is_partial)
    planned = PlannedRounds.of(run, learner, prompt_sides(run, is_partial), rounds)
    fits = [
        each
        for number in range(rounds + 1)
        for each in (planned.known(number) * 2 if is_partial else planned.last(number))  # a critic, and the head
    ]
    return Workload(
        planned.generations,
        fitted=sum(map(len, fits)),
        scored=sum(map(len, planned.in_rounds)) if is_partial else 0,
    )


def num_rounds(run: Run, is_partial: bool) -> int:
    """Return the largest number of rounds after the first one."""
    if run.config.rounds is not None:
        return run.config.rounds
    return 0 if is_partial else _ROUNDS


def prompt_sides(run: Run, is_partial: bool) -> tuple[PromptSide, PromptSide]:
    """Return the prompts to fit on, and those held out."""
    each = replies_per_prompt(run) if is_partial else run.config.replies_each or _REPLIES_PER_PROMPT
    train_data, held_out_data = run.plan.prompts
    seed = run.config.seed
    return (
        PromptSide(train_data, limited_prompts(run, train_data, each), each, seed),
        PromptSide(held_out_data, limited_prompts(run, held_out_data, each), each, seed + HELD_OUT_SEED),
    )
