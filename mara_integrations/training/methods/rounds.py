"""Training against a reward, round by round, on replies that the model generates itself.

Round 0 uses replies of the base model: an untrained head is the base model, so they are on-policy, and they are cached
for every other reward. In each further round the gated model generates. After each round the head's scale is set to the
KL budget. Rounds end when one does not help, measured by the reward on held-out replies of the gated model. How a head
learns from a round depends on its form: a `Learner` does that.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from mara_integrations.data import Dataset
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Conversation
from mara_integrations.rewards import Reward, reward_name
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import limited_prompts, replies_per_prompt
from mara_integrations.training.collect.rewards import check_differ, report_mean, score_replies, with_opinion
from mara_integrations.training.collect.workload import Generation, Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.records.store import load_or_compute
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.scoring.held_out import compare_held_out, report_comparison
from mara_integrations.training.scoring.partial_rewards import uses_partial_text
from mara_integrations.training.scoring.scale import report_scale, set_scale

_ROUNDS, _REPLIES_PER_PROMPT = 2, 4  # defaults where whole replies are scored
_HELD_OUT_SEED, _ROUND_SEED = 500_000, 1_000_000  # offsets larger than any number of replies


@dataclass(frozen=True, slots=True)
class PromptSide:
    """One side of the split.

    Attributes:
        data: Rows of the prompts.
        prompts: The prompts.
        replies_per_prompt: Number of replies to generate to each.
        seed: Seed of the first reply.
    """

    data: Dataset
    prompts: list[Conversation]
    replies_per_prompt: int
    seed: int

    def quarter(self, number: int) -> PromptSide:
        """Return a quarter of the prompts, another one each round: gated replies cost as much as the base model's."""
        count = max(1, len(self.prompts) // 4)
        prompts = [self.prompts[(number * count + i) % len(self.prompts)] for i in range(count)]
        return replace(self, prompts=prompts, seed=self.seed + _ROUND_SEED * (number + 1))


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


class Learner(ABC, Generic[ExperienceT]):
    """Fits heads of one form to rounds of replies.

    Args:
        run: A run with a reward.
        head: An untrained head of that form; it is fitted in place.
    """

    # What the gated model generates in a round: names of stages, and their temperatures.
    stages: ClassVar[Mapping[str, float]]

    def __init__(self, run: Run, head: MARAHead) -> None:
        self.run, self.head = run, head

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

    @abstractmethod
    def scale_within_budget(self, experience: ExperienceT, sampled_at: float = 0.0) -> float:
        """Return the largest scale within the KL budget, on replies that the head generated at scale `sampled_at`."""

    @abstractmethod
    def kl_per_token(self, experience: ExperienceT, sampled_at: float) -> float:
        """Return KL(gate || base) of the head, in nats a token; arguments as in `scale_within_budget`."""

    @classmethod
    def checked_at_the_end(cls, run: Run, held_out: PromptSide) -> list[Generation]:
        """Return what `hold_quality` generates at most."""
        return []

    def hold_quality(self, held_out: PromptSide, base: ExperienceT, best: BestRound[ExperienceT]) -> None:
        """Lower the scale, and the strength of greedy requests, to where replies keep perplexity and variety.

        Args:
            held_out: The held-out prompts.
            base: Replies of the base model to them.
            best: The head as it is, and its replies to them.
        """


@dataclass(frozen=True, slots=True)
class BestRound(Generic[ExperienceT]):
    """The head after the best round so far.

    Attributes:
        gain: Mean reward of its held-out replies less that of the base model's.
        weights: Weights of the head.
        scale: Scale of the head.
        held_out: Its held-out replies.
    """

    gain: float
    weights: dict[str, Tensor]
    scale: float
    held_out: ExperienceT


def train_on_reward(learner: Learner[ExperienceT]) -> MethodResult:
    """Train a head against the run's reward."""
    reward = learner.run.plan.reward
    assert reward is not None
    return train_in_rounds(learner, reward_name(reward), {reward_name(reward): reward})


def train_in_rounds(learner: Learner[ExperienceT], trained_on: str, rewards: Mapping[str, Reward]) -> MethodResult:
    """Train a head against the reward of the run's plan, and report others.

    Args:
        learner: Holds the run and the untrained head.
        trained_on: Name of the reward.
        rewards: All rewards to report, by name.

    Raises:
        DataError: If the reward has no opinion, or the same of all replies.
    """
    run, head = learner.run, learner.head
    rewards, is_partial = {**rewards, **run.plan.judges}, uses_partial_text(run)
    if not is_partial:
        run.say("  the reward scores whole replies; if it can score unfinished ones, --partial-text learns much more")
    train_side, held_out_side = prompt_sides(run, is_partial)
    untrained = run.new_head().eval()
    rounds = [gather(learner, "base replies", train_side, untrained, is_base=True)]
    base = gather(learner, "held-out base replies", held_out_side, untrained, is_base=True)
    held_out_rounds = [base]
    check_differ(rounds[0].rewards)
    best: BestRound[ExperienceT] | None = None
    for number in range(num_rounds(run, is_partial) + 1):
        if best is not None:
            side = train_side.quarter(number - 1)
            for stage, temperature in learner.stages.items():
                rounds.append(gather(learner, f"{stage} {number}", side, head, temperature=temperature))
            held_out_rounds.append(best.held_out)
        if is_partial:
            learner.fit_parts(f"fit {number + 1}", rounds, held_out_rounds)
        else:
            learner.fit_whole(f"fit {number + 1}", rounds[-1], held_out_rounds[-1])
        set_scale(head, learner.scale_within_budget(base))
        gated = gather(learner, f"held-out gated replies {number + 1}", held_out_side, head)
        prompts = held_out_side.prompts
        comparison = compare_held_out(run, rewards, held_out_side.data, prompts, base.generated, gated.generated, head)
        report_comparison(run, f"round {number + 1}", comparison)
        # by name: a judge, which is only to report, must not choose among rounds
        change = comparison.rewards.get(trained_on)
        gain = change.difference.mean if change is not None else -math.inf
        if best is not None and gain <= best.gain:
            run.say("  this round did not help: the head stays as it was before")
            break
        weights = {name: tensor.clone() for name, tensor in head.state_dict().items()}
        best = BestRound(gain, weights, head.config.scale, gated)
    assert best is not None
    return MethodResult(rewards=rewards, kl_per_token=_keep(learner, held_out_side, base, best))


def _keep(
    learner: Learner[ExperienceT], held_out: PromptSide, base: ExperienceT, best: BestRound[ExperienceT]
) -> float:
    """Make the head what it was after the best round, and return KL(gate || base), in nats a token."""
    head = learner.head
    head.load_state_dict(best.weights)
    # on its own replies, which lie further from the base model, the budget may allow less
    set_scale(head, min(best.scale, learner.scale_within_budget(best.held_out, best.scale)))
    learner.hold_quality(held_out, base, best)
    kl = learner.kl_per_token(best.held_out, best.scale)
    report_scale(learner.run, head.config.scale, kl)
    return kl


def work_of_rounds(run: Run, learner: type[Learner[ExperienceT]], *, is_partial: bool) -> Workload:
    """Return what `train_in_rounds` will do if no round ends it early."""
    train_side, held_out = prompt_sides(run, is_partial)
    rounds = num_rounds(run, is_partial)

    def generation(side: PromptSide, *, is_base: bool = False, temperature: float = 1.0) -> Generation:
        return Generation(side.prompts, side.replies_per_prompt, side.seed, True, is_base, temperature)

    base = [generation(side, is_base=True) for side in (train_side, held_out)]
    later = [
        generation(train_side.quarter(number), temperature=temperature)
        for number in range(rounds)
        for temperature in learner.stages.values()
    ]
    gated = [generation(held_out) for _ in range(rounds + 1)]
    scored = sum(map(len, [*base, *later, *gated]))
    per_round = len(later) // rounds if rounds else 0
    fits = []
    for number in range(rounds + 1):
        known = [base[0], *later[: number * per_round]]
        fits += [*known, *gated[:number], base[1]] * 2 if is_partial else [known[-1], base[1]]  # a critic, and the head
    return Workload(
        [*base, *later, *gated, *learner.checked_at_the_end(run, held_out)],
        fitted=sum(map(len, fits)),
        scored=scored if is_partial else 0,
    )


def gather(
    learner: Learner[ExperienceT],
    stage: str,
    side: PromptSide,
    head: MARAHead,
    *,
    is_base: bool = False,
    temperature: float = 1.0,
) -> ExperienceT:
    """Generate replies and score them; both are stored. Replies the reward has no opinion on are left out."""
    run, is_partial = learner.run, uses_partial_text(learner.run)
    generated = generate_replies(
        run, stage, side.prompts, side.replies_per_prompt, side.seed, head, is_base=is_base, temperature=temperature
    )

    def scored() -> dict[str, Any]:
        scores = score_replies(run, side.data, side.prompts, generated)
        replies, rewards = map(list, zip(*with_opinion(stage, generated, scores), strict=True))
        parts = learner.score_parts(side, replies, rewards) if is_partial else {}
        return {"indices": [i for i, value in enumerate(scores) if value is not None], "rewards": rewards, **parts}

    data, _ = load_or_compute(run.stored(f"rewards of {stage}"), scored)
    report_mean(run, stage, len(generated), data["rewards"])
    replies = [generated[i] for i in data["indices"]]
    return learner.experience(Experience(generated, replies, data["rewards"]), data if is_partial else None)


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
        PromptSide(held_out_data, limited_prompts(run, held_out_data, each), each, seed + _HELD_OUT_SEED),
    )
