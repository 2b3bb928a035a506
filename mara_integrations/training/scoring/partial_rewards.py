"""What parts of replies are worth to a reward: every beginning of a reply, and every candidate that was passed over.

A reward that takes parts turns one number a reply into one a token, and says of a candidate what it would have changed
without a further run of the model.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from mara_integrations.data import Dataset
from mara_integrations.messages import Conversation
from mara_integrations.rewards import takes_partial_text
from mara_integrations.training import gather
from mara_integrations.training.context import Run
from mara_integrations.training.rollouts.decisions import taken_rank
from mara_integrations.training.rollouts.replies import Reply, token_texts


def asks_partial_text(run: Run) -> bool:
    """Whether the reward is asked about unfinished replies: as the settings say, else as it says itself."""
    if run.config.partial_text is not None:
        return run.config.partial_text
    assert run.plan.reward is not None
    return takes_partial_text(run.plan.reward)


def prefix_worths(
    run: Run, data: Dataset, prompts: Sequence[Conversation], replies: Sequence[Reply], worths: Sequence[float]
) -> list[list[float]]:
    """What each reply's text is worth after 0, 1, ... T tokens; where the reward has no opinion, what it was before.

    The reward is not asked about empty texts: they are taken for worth what texts of one token are on average.

    Args:
        run: With a reward.
        data: Where the prompts come from.
        prompts: That `Reply.prompt` counts.
        replies: To judge.
        worths: Of the whole replies.
    """
    texts = [token_texts(run.model, reply.token_ids)[:-1] for reply in replies]
    repeated = [reply for reply, parts in zip(replies, texts, strict=True) for _ in parts]
    values = iter(gather.scores(run, data, prompts, repeated, [part for parts in texts for part in parts]))
    known = [[next(values) for _ in parts] + [worth] for parts, worth in zip(texts, worths, strict=True)]
    firsts = [row[0] for row in known if row[0] is not None]
    start = statistics.fmean(firsts) if firsts else statistics.fmean(worths)
    filled = []
    for row in known:
        filled.append([start])
        for value in row:
            filled[-1].append(filled[-1][-1] if value is None else value)
    return filled


def candidate_gains(
    run: Run,
    data: Dataset,
    prompts: Sequence[Conversation],
    replies: Sequence[Reply],
    worths: Sequence[Sequence[float]],
) -> Tensor:
    """What each candidate changes in the worth of the text, one for each of `decisions.decisions_taken`, (N,).

    Args:
        run: With a reward.
        data: Where the prompts come from.
        prompts: That `Reply.prompt` counts.
        replies: Drawn from a gate, their positions kept.
        worths: As `prefix_worths` gives them.
    """
    owners: list[Reply] = []
    texts: list[str] = []
    for reply in replies:
        for position in reply.positions:
            for token_id in position.token_ids[: taken_rank(reply, position)]:
                owners.append(reply)
                texts.append(token_texts(run.model, [*reply.token_ids[: position.index], token_id], last=1)[0])
    values = iter(gather.scores(run, data, prompts, owners, texts))
    gains: list[float] = []
    for reply, prefixes in zip(replies, worths, strict=True):
        for position in reply.positions:
            rank, before = taken_rank(reply, position), prefixes[position.index]
            for _ in range(rank):
                value = next(values)
                gains.append(0.0 if value is None else value - before)
            if rank < len(position.token_ids) - 1:  # the last candidate is taken unasked
                gains.append(prefixes[position.index + 1] - before)
    return torch.tensor(gains)
