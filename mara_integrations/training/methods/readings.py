"""Readings of base replies: what a model makes of their candidates, in the replies' own contexts or in others.

The difference of two readings of a candidate is what q is fitted to, see `contrast`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mara_integrations.engine.backends.protocol import Backend
from mara_integrations.messages import Conversation
from mara_integrations.training.context import Run
from mara_integrations.training.learning.q_objectives import centred
from mara_integrations.training.records.store import as_dict, load_or_compute
from mara_integrations.training.rollouts.positions import Positions
from mara_integrations.training.rollouts.replies import OnReply, Reply
from mara_integrations.training.rollouts.rereading import Rereading, contexts_of, reread
from mara_integrations.training.teachers import Reader

_REPLIES_PER_FILE = 64


@dataclass(frozen=True, slots=True)
class Side:
    """Base replies to the prompts of one side, read again.

    Attributes:
        name: Name of the side in stages.
        prompts: The prompts.
        replies: R replies.
        positions: Their positions.
    """

    name: str
    prompts: list[Conversation]
    replies: list[Reply]
    positions: Positions

    @classmethod
    def of(cls, name: str, prompts: list[Conversation], replies: list[Reply]) -> Side:
        """Return a side with the positions of its replies."""
        return cls(name, prompts, replies, Positions.of(replies))


def summed_contrasts(
    positions: Positions, these: Sequence[tuple[Tensor, float]], those: Sequence[Tensor], aside: Sequence[int] = ()
) -> Tensor:
    """Return the sum of the differences of each of these readings from each of those, (P, K).

    Each difference is centred under the base model, so that a constant of the position, as that of the softmax, falls
    out, and counts in its own standard deviations. So do all of one reading, times its weight.

    Args:
        positions: The P positions.
        these: Readings of their candidates, each (P, K) in nats, and its weight.
        those: What they differ from, each (P, K).
        aside: Tokens that the readings say nothing of: their values are 0.
    """
    log_probs, live = positions.log_probs, positions.live
    if len(aside):
        log_probs = log_probs.masked_fill(torch.isin(positions.token_ids, torch.tensor(aside)), -torch.inf)
    found = torch.zeros_like(log_probs)
    for this, weight in these:
        changes = [centred(this - that, log_probs) for that in those]
        of_reading = torch.stack([change / _spread(change, live) for change in changes]).sum(0)
        found += weight * of_reading / _spread(of_reading, live)
    return found


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
    contexts = contexts_of(model, prompts, side.replies)
    parts, stage = [], f"{side.name} {name}"
    with run.stage(stage, len(side.replies)) as advance:
        for start in range(0, len(side.replies), _REPLIES_PER_FILE):
            replies = side.replies[start : start + _REPLIES_PER_FILE]
            read = partial(_read, backend, contexts, replies, advance)
            found, was_stored = load_or_compute(run.stored(stage, start), read)
            if was_stored:
                advance(len(replies))
            parts.append(Rereading(**found))
    width = side.positions.token_ids.shape[1]
    wide = [torch.nn.functional.pad(part.candidates, (0, width - part.candidates.shape[1])) for part in parts]
    return Rereading(torch.cat(wide), torch.cat([part.tokens for part in parts]))


def _read(backend: Backend, contexts: Sequence[Sequence[int]], replies: Sequence[Reply], advance: OnReply) -> object:
    return as_dict(reread(backend, contexts, replies, advance))
