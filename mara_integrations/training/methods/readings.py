"""Readings of replies: what a model makes of their candidates, in the replies' own contexts or in others.

The difference of two readings of a candidate is what q is fitted to, see `contrast`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mara_integrations.engine.backends.protocol import Backend
from mara_integrations.messages import Conversation
from mara_integrations.rewards import Scores
from mara_integrations.training.context import Run
from mara_integrations.training.learning.q_objectives import centred
from mara_integrations.training.records.store import as_dict, load_or_compute
from mara_integrations.training.rollouts.positions import Positions, join_columns
from mara_integrations.training.rollouts.replies import OnReply, Reply
from mara_integrations.training.rollouts.rereading import Rereading, contexts_of, reread
from mara_integrations.training.teachers import Reader

_REPLIES_PER_FILE = 64


@dataclass(frozen=True, slots=True)
class Side:
    """Replies to the prompts of one side, read again.

    Attributes:
        prompts: The prompts.
        parts: The replies by the stage that generated them. What is read of a part is stored under its name.
        positions: The positions of all replies.
    """

    prompts: list[Conversation]
    parts: Mapping[str, list[Reply]]
    positions: Positions

    @property
    def generated(self) -> list[Reply]:
        """All replies, part by part."""
        return [reply for part in self.parts.values() for reply in part]

    @classmethod
    def of(cls, name: str, prompts: list[Conversation], replies: list[Reply]) -> Side:
        """Return a side of one part, with the positions of its replies."""
        return cls(prompts, {name: replies}, Positions.of(replies))

    @classmethod
    def join(cls, sides: Sequence[Side]) -> Side:
        """Return all parts of sides in order, each with its own prompts."""
        prompts: list[Conversation] = []
        parts: dict[str, list[Reply]] = {}
        for side in sides:
            for name, replies in side.parts.items():
                parts[name] = [replace(each, prompt_index=len(prompts) + each.prompt_index) for each in replies]
            prompts += side.prompts
        return cls(prompts, parts, Positions.of([reply for part in parts.values() for reply in part]))


@dataclass(frozen=True, slots=True)
class Opinion:
    """Scores of whole replies by one contrast.

    Attributes:
        weight: Its weight among others.
        scores: By how many nats a token each reply is more probable under the one reading than under the other.
    """

    weight: float
    scores: Scores


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference between readings of a side.

    Attributes:
        values: Targets of q for the candidates, centred under the base model, (P, K).
        opinions: Scores of whole replies by each contrast, by name.
    """

    values: Tensor
    opinions: Mapping[str, Opinion]


def difference_of(
    side: Side, these: Mapping[str, tuple[Rereading, float]], those: Sequence[Rereading], aside: Sequence[int] = ()
) -> Difference:
    """Return the sum of the differences of each of these readings from each of those.

    Each difference is centred under the base model, so that a constant of the position, as that of the softmax, falls
    out, and counts in its own standard deviations. So do all of one reading, times its weight.

    Args:
        side: The replies that were read, with P positions.
        these: Readings by name, each with its weight.
        those: What they differ from.
        aside: Tokens that the readings say nothing of: their values are 0.
    """
    log_probs, live = side.positions.log_probs, side.positions.live
    if len(aside):
        log_probs = log_probs.masked_fill(torch.isin(side.positions.token_ids, torch.tensor(aside)), -torch.inf)
    values, opinions = torch.zeros_like(log_probs), dict[str, Opinion]()
    for name, (this, weight) in these.items():
        changes = [centred(this.candidates - that.candidates, log_probs) for that in those]
        of_reading = torch.stack([change / _spread(change, live) for change in changes]).sum(0)
        values += weight * of_reading / _spread(of_reading, live)
        of_tokens = this.tokens - torch.stack([that.tokens for that in those]).mean(0)
        shown = "contrast" if len(these) == 1 else f"contrast {name}"
        opinions[shown] = Opinion(weight, _mean_of_replies(side.generated, of_tokens, aside))
    return Difference(values, opinions)


def _mean_of_replies(replies: Sequence[Reply], of_tokens: Tensor, aside: Sequence[int] = ()) -> Scores:
    """Return the mean of numbers of tokens, (T,), over each reply; tokens that are left `aside` count as 0."""
    tokens = torch.tensor([token for reply in replies for token in reply.token_ids])
    kept = of_tokens.masked_fill(torch.isin(tokens, torch.tensor(aside, dtype=torch.long)), 0.0)
    return [float(part.mean()) for part in kept.split([len(reply.token_ids) for reply in replies])]


def as_generated(side: Side) -> Rereading:
    """Return what the base model made of a side's replies when they were generated."""
    tokens = torch.tensor([each for reply in side.generated for each in reply.log_probs])
    return Rereading(side.positions.log_probs, tokens)


def _spread(values: Tensor, live: Tensor) -> float:
    """Return the standard deviation of values of candidates, 1 where all are the same."""
    return float(values[live].std()) or 1.0


def read_as(
    run: Run, side: Side, name: str, prompts: Sequence[Conversation], reader: Reader | None = None
) -> Rereading:
    """Return what a model makes of a side's replies after other prompts; each part is stored.

    Args:
        run: The run.
        side: The replies.
        name: Name of the reading in stages.
        prompts: The other prompts, by `Reply.prompt_index`.
        reader: What reads them, in its own chat template; None is the run's model.
    """
    model, backend = (run.model, run.backend) if reader is None else (reader.model, reader.backend)
    contexts = contexts_of(model, prompts, side.generated)
    found: list[Rereading] = []
    for part, replies in side.parts.items():
        stage = f"{part} {name}"
        with run.stage(stage, len(replies)) as advance:
            for start in range(0, len(replies), _REPLIES_PER_FILE):
                some = replies[start : start + _REPLIES_PER_FILE]
                read, was_stored = load_or_compute(
                    run.stored(stage, start), partial(_read, backend, contexts, some, advance)
                )
                if was_stored:
                    advance(len(some))
                found.append(Rereading(**read))
    return Rereading(join_columns([each.candidates for each in found]), torch.cat([each.tokens for each in found]))


def _read(backend: Backend, contexts: Sequence[Sequence[int]], replies: Sequence[Reply], advance: OnReply) -> object:
    return as_dict(reread(backend, contexts, replies, advance))
