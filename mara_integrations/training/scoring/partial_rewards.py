"""Rewards of unfinished replies: of every beginning of a reply, and of every candidate that was rejected.

A reward that scores partial text gives a number a token instead of one a reply, and tells what a rejected candidate
would have changed without another forward of the model.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from mara_integrations.data import Dataset
from mara_integrations.messages import Conversation
from mara_integrations.rewards import takes_partial_text
from mara_integrations.training.collect.rewards import score_replies
from mara_integrations.training.context import Run
from mara_integrations.training.rollouts.decisions import taken_rank
from mara_integrations.training.rollouts.positions import Positions
from mara_integrations.training.rollouts.replies import Reply, token_texts


def uses_partial_text(run: Run) -> bool:
    """Whether unfinished replies are scored: a setting, else as the reward itself says."""
    if run.config.partial_text is not None:
        return run.config.partial_text
    assert run.plan.reward is not None
    return takes_partial_text(run.plan.reward)


def prefix_rewards(
    run: Run, data: Dataset, prompts: Sequence[Conversation], replies: Sequence[Reply], rewards: Sequence[float]
) -> list[list[float]]:
    """Return the reward of each reply's text after 0, 1, ... T of its tokens.

    Where the reward has no opinion, the reward of the text before stands. Empty texts are not scored: they count as
    texts of one token do on average.

    Args:
        run: A run with a reward.
        data: Rows of the prompts.
        prompts: The prompts that `Reply.prompt_index` counts.
        replies: The replies.
        rewards: Rewards of the whole replies.
    """
    beginnings = [token_texts(run.model, reply.token_ids)[:-1] for reply in replies]
    owners = [reply for reply, texts in zip(replies, beginnings, strict=True) for _ in texts]
    scores = iter(score_replies(run, data, prompts, owners, [text for texts in beginnings for text in texts]))
    scored = [[next(scores) for _ in texts] + [reward] for texts, reward in zip(beginnings, rewards, strict=True)]
    firsts = [row[0] for row in scored if row[0] is not None]
    of_empty_text = statistics.fmean(firsts) if firsts else statistics.fmean(rewards)
    filled = []
    for row in scored:
        filled.append([of_empty_text])
        for value in row:
            filled[-1].append(filled[-1][-1] if value is None else value)
    return filled


def candidate_gains(
    run: Run,
    data: Dataset,
    prompts: Sequence[Conversation],
    replies: Sequence[Reply],
    prefixes: Sequence[Sequence[float]],
) -> Tensor:
    """Return by how much each candidate raises the reward of the text, one number a decision of `decisions_of`, (N,).

    Args:
        run: A run with a reward.
        data: Rows of the prompts.
        prompts: The prompts that `Reply.prompt_index` counts.
        replies: Replies sampled from a gate, with their positions.
        prefixes: Rewards of their beginnings, see `prefix_rewards`.
    """
    owners: list[Reply] = []
    texts: list[str] = []
    for reply in replies:
        for position in reply.positions:
            for token_id in position.token_ids[: taken_rank(reply, position)]:
                owners.append(reply)
                texts.append(token_texts(run.model, [*reply.token_ids[: position.index], token_id], last=1)[0])
    scores = iter(score_replies(run, data, prompts, owners, texts))
    gains: list[float] = []
    for reply, of_prefix in zip(replies, prefixes, strict=True):
        for position in reply.positions:
            rank, before = taken_rank(reply, position), of_prefix[position.index]
            for _ in range(rank):
                value = next(scores)
                gains.append(0.0 if value is None else value - before)
            if rank < len(position.token_ids) - 1:  # the last candidate is taken without asking
                gains.append(of_prefix[position.index + 1] - before)
    return torch.tensor(gains)


def position_gains(
    run: Run,
    data: Dataset,
    prompts: Sequence[Conversation],
    replies: Sequence[Reply],
    prefixes: Sequence[Sequence[float]],
    positions: Positions,
) -> Tensor:
    """Return by how much each candidate of each position raises the reward of the text, (P, K).

    Args:
        run: A run with a reward.
        data: Rows of the prompts.
        prompts: The prompts that `Reply.prompt_index` counts.
        replies: The replies.
        prefixes: Rewards of their beginnings, see `prefix_rewards`.
        positions: Their positions, with the candidates to score.
    """
    owners: list[Reply] = []
    texts: list[str] = []
    places: list[tuple[int, int, float]] = []
    token_ids, live = positions.token_ids.tolist(), positions.live.tolist()
    gains = [[0.0] * len(row) for row in token_ids]
    rows = zip(positions.replies.tolist(), positions.places.tolist(), positions.taken.tolist(), strict=True)
    for row, (index, place, taken) in enumerate(rows):
        reply, of_reply = replies[index], prefixes[index]
        before = reply.token_ids[:place]
        for column, token_id in enumerate(token_ids[row]):
            if column == taken:
                gains[row][column] = of_reply[place + 1] - of_reply[place]
            elif live[row][column]:
                owners.append(reply)
                texts.append(token_texts(run.model, [*before, token_id], last=1)[0])
                places.append((row, column, of_reply[place]))
    scores = score_replies(run, data, prompts, owners, texts) if texts else []
    for (row, column, worth), value in zip(places, scores, strict=True):
        if value is not None:
            gains[row][column] = value - worth
    return torch.tensor(gains).reshape(positions.token_ids.shape)
