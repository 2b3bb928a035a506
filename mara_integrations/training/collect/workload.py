"""What a method will generate, read and fit, as far as it is known before it starts: what a dry run estimates from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import Self

from mara_integrations.messages import Conversation
from mara_integrations.training.collect.given import given_replies
from mara_integrations.training.context import Run
from mara_integrations.training.rollouts.replies import GivenReply


@dataclass(frozen=True, slots=True)
class Generation:
    """A planned call of `generate_replies`; see there.

    Attributes:
        prompts: Prompts, with the system prompt.
        replies_per_prompt: Number of replies to each.
        seed: Seed of the first reply.
        is_gated: Whether a head gates the replies, trained or not.
        is_base: Whether the replies are those of the base model, so that they may be cached.
        temperature: Temperature of the replies.
        relative_s: Time to read a token of them again, over that of the run's own model.
    """

    prompts: Sequence[Conversation]
    replies_per_prompt: int = 1
    seed: int = 0
    is_gated: bool = False
    is_base: bool = False
    temperature: float = 1.0
    relative_s: float = 1.0

    def __len__(self) -> int:
        return len(self.prompts) * self.replies_per_prompt


@dataclass(frozen=True, slots=True)
class Reading:
    """Given replies to read.

    Attributes:
        given: The replies.
        is_by_token: Whether they are read token by token, as decisions.
    """

    given: Sequence[GivenReply]
    is_by_token: bool = False

    def __len__(self) -> int:
        return len(self.given)

    @classmethod
    def of_both_sides(cls, run: Run, *, is_by_token: bool = False) -> list[Self]:
        """Return the readings of all replies that the data brings."""
        return [cls(given_replies(run, data)[0], is_by_token) for data in (run.plan.train, run.plan.held_out)]


@dataclass(frozen=True, slots=True)
class Workload:
    """The work of a method. Rounds may end early; then it is less.

    Attributes:
        generations: Replies to generate.
        readings: Replies to read.
        fitted: Number of replies in an epoch of each fit, summed over the fits.
        updates: Number of examples in updates that are no epochs of a fit.
        scored: Number of replies of which every beginning is scored, and candidates.
        rereadings: Which of the generated replies are read again in another context; one entry each time.
    """

    generations: Sequence[Generation] = ()
    readings: Sequence[Reading] = ()
    fitted: int = 0
    updates: int = 0
    scored: int = 0
    rereadings: Sequence[Generation] = ()
