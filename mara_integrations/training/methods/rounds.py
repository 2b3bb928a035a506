"""Rounds of training on replies that the model generates itself, which methods on rewards and on contrasts share.

Round 0 uses replies of the base model: an untrained head is the base model, so they are on-policy, and they are cached
for every later run. In each further round the gated model generates. After each round the head's scale is set to the
KL budget. Rounds end when one does not help, measured on held-out replies of the gated model. What a round's replies
are scored or read by, and what measures it, a `Learner` says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, TypeVar

from torch import Tensor

from mara_integrations.data import Dataset
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Conversation
from mara_integrations.training.collect.workload import Generation
from mara_integrations.training.context import Run
from mara_integrations.training.scoring.scale import report_scale, set_scale

HELD_OUT_SEED, _ROUND_SEED = 500_000, 1_000_000  # offsets larger than any number of replies


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


ExperienceT = TypeVar(
    "ExperienceT"
)  # replies of one round to the prompts of one side, and what a learner needs of them


class Learner(ABC, Generic[ExperienceT]):
    """Fits heads of one form to rounds of replies, and measures them.

    Args:
        run: The run.
        head: An untrained head of that form; it is fitted in place.
    """

    # What the gated model generates in a round: names of stages, and their temperatures.
    stages: ClassVar[Mapping[str, float]]

    def __init__(self, run: Run, head: MARAHead) -> None:
        self.run, self.head = run, head

    @abstractmethod
    def gather(
        self, stage: str, side: PromptSide, head: MARAHead, *, is_base: bool = False, temperature: float = 1.0
    ) -> ExperienceT:
        """Generate replies to the prompts of a side, and store them; arguments as in `generate_replies`."""

    @abstractmethod
    def fit(self, name: str, rounds: Sequence[ExperienceT], held_out_rounds: Sequence[ExperienceT]) -> None:
        """Fit the head to the rounds so far."""

    def fits_again(self, base: ExperienceT, gated: ExperienceT) -> bool:
        """Return whether the first replies of the head call for another fit, to more than the first one.

        Args:
            base: Replies of the base model to held-out prompts.
            gated: Replies of the head, with the same random numbers.
        """
        return False

    @abstractmethod
    def gain(self, name: str, held_out: PromptSide, base: ExperienceT, gated: ExperienceT) -> float:
        """Return how much better gated replies to held-out prompts are than the base model's, and report it.

        Args:
            name: Name of the round.
            held_out: The held-out prompts.
            base: Replies of the base model to them.
            gated: Replies of the head, with the same random numbers.
        """

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
        """Lower the scale, and set greedy requests, to where replies keep perplexity and variety.

        Args:
            held_out: The held-out prompts.
            base: Replies of the base model to them.
            best: The head as it is, and its replies to them.
        """


@dataclass(frozen=True, slots=True)
class BestRound(Generic[ExperienceT]):
    """The head after the best round so far.

    Attributes:
        gain: What `Learner.gain` says of its held-out replies.
        weights: Weights of the head.
        scale: Scale of the head.
        held_out: Its held-out replies.
    """

    gain: float
    weights: dict[str, Tensor]
    scale: float
    held_out: ExperienceT


def train_in_rounds(
    learner: Learner[ExperienceT], sides: tuple[PromptSide, PromptSide], num_rounds: int
) -> tuple[float, ExperienceT]:
    """Train a head in rounds; return KL(gate || base), in nats a token, and the base replies to held-out prompts.

    Args:
        learner: Holds the run and the untrained head.
        sides: Prompts to fit on, and held out.
        num_rounds: Largest number of rounds after the first one.
    """
    run, head = learner.run, learner.head
    train_side, held_out_side = sides
    untrained = run.new_head().eval()
    rounds = [learner.gather("base replies", train_side, untrained, is_base=True)]
    base = learner.gather("held-out base replies", held_out_side, untrained, is_base=True)
    held_out_rounds = [base]
    best: BestRound[ExperienceT] | None = None

    def fitted(name: str) -> ExperienceT:
        """Fit the head to the rounds so far, set its scale, and return its replies to held-out prompts."""
        learner.fit(f"fit {name}", rounds, held_out_rounds)
        set_scale(head, learner.scale_within_budget(base))
        return learner.gather(f"held-out gated replies {name}", held_out_side, head)

    for number in range(num_rounds + 1):
        if best is not None:
            side = train_side.quarter(number - 1)
            for stage, temperature in learner.stages.items():
                rounds.append(learner.gather(f"{stage} {number}", side, head, temperature=temperature))
            held_out_rounds.append(best.held_out)
        gated = fitted(f"{number + 1}")
        if best is None and learner.fits_again(base, gated):
            gated = fitted("1, again")
        gain = learner.gain(f"round {number + 1}", held_out_side, base, gated)
        if best is not None and gain <= best.gain:
            run.say("  this round did not help: the head stays as it was before")
            break
        weights = {name: tensor.clone() for name, tensor in head.state_dict().items()}
        best = BestRound(gain, weights, head.config.scale, gated)
    assert best is not None
    return _keep(learner, held_out_side, base, best), base


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


@dataclass(frozen=True, slots=True)
class PlannedRounds:
    """What `train_in_rounds` will generate and fit if no round ends it early.

    Attributes:
        base: Base replies to fit on, and held out.
        later: Gated replies to fit on, of each round after the first one.
        gated: Held-out gated replies, of each round.
        at_the_end: What is generated after the rounds.
    """

    base: tuple[Generation, Generation]
    later: list[list[Generation]]
    gated: list[Generation]
    at_the_end: list[Generation]

    @classmethod
    def of(
        cls, run: Run, learner: type[Learner[ExperienceT]], sides: tuple[PromptSide, PromptSide], num_rounds: int
    ) -> PlannedRounds:
        """Return what `train_in_rounds` will do, by the same arguments."""
        train_side, held_out = sides

        def generation(side: PromptSide, *, is_base: bool = False, temperature: float = 1.0) -> Generation:
            return Generation(side.prompts, side.replies_per_prompt, side.seed, True, is_base, temperature)

        return cls(
            base=(generation(train_side, is_base=True), generation(held_out, is_base=True)),
            later=[
                [generation(train_side.quarter(number), temperature=each) for each in learner.stages.values()]
                for number in range(num_rounds)
            ],
            gated=[generation(held_out) for _ in range(num_rounds + 1)],
            at_the_end=learner.checked_at_the_end(run, held_out),
        )

    @property
    def in_rounds(self) -> list[Generation]:
        """All that the rounds generate."""
        return [*self.base, *(planned for of_round in self.later for planned in of_round), *self.gated]

    @property
    def generations(self) -> list[Generation]:
        """All that is generated."""
        return [*self.in_rounds, *self.at_the_end]

    def known(self, number: int) -> list[Generation]:
        """Return all replies, to fit on and held out, that are known to the fit of a round; the first is round 0."""
        later = [planned for of_round in self.later[:number] for planned in of_round]
        return [self.base[0], *later, *self.gated[:number], self.base[1]]

    def last(self, number: int) -> list[Generation]:
        """Return the last of the replies to fit on that are known to the fit of a round, and held-out base replies."""
        return [(self.later[number - 1][-1] if number else self.base[0]), self.base[1]]
