"""Rewards beside a contrast: the advantages that `rloo` would learn from are added to what the contrast says.

Both are numbers for each candidate of each position of the same base replies, centred under the base model. Each counts
in its own standard deviations, times its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mara_integrations.data import Dataset
from mara_integrations.rewards import Reward, reward_name
from mara_integrations.training.collect.rewards import check_differ, report_mean, score_replies, with_opinion
from mara_integrations.training.context import Run
from mara_integrations.training.learning.objectives import GAMMA
from mara_integrations.training.learning.q_objectives import centred
from mara_integrations.training.methods.q_critic import (
    NUM_SCORED,
    ScoredPositions,
    candidate_advantages,
    scored_parts,
)
from mara_integrations.training.methods.readings import Side
from mara_integrations.training.records.store import load_or_compute
from mara_integrations.training.rollouts.positions import Positions


def with_rewards(
    run: Run, name: str, sides: Sequence[Side], values: Sequence[Tensor]
) -> tuple[list[Positions], list[Tensor]]:
    """Return positions with the candidates that rewards score, and the sum of a contrast and of all rewards there.

    Args:
        run: A run with a reward.
        name: Name of the fit.
        sides: What to fit on, and what is held out.
        values: What the contrast says of the candidates, (P, K) a side, in standard deviations.
    """
    positions = [side.positions.narrowed(NUM_SCORED) for side in sides]
    sums = [
        centred(side.positions.narrowed_values(value, NUM_SCORED), where.log_probs)
        for side, value, where in zip(sides, values, positions, strict=True)
    ]
    for number, (reward, weight) in enumerate(run.plan.weighted_rewards, start=1):
        stored = f"reward {number}"
        for total, of_reward in zip(sums, _advantages(run, name, stored, reward, sides), strict=True):
            total += weight * of_reward
    return positions, sums


def _advantages(run: Run, name: str, stored: str, reward: Reward, sides: Sequence[Side]) -> list[Tensor]:
    """Return the advantages of the scored candidates by one reward, in standard deviations, (P, K) a side.

    They are 0 in replies that the reward has no opinion on.

    Raises:
        DataError: If it has an opinion on none of a part, or the same of all replies to fit on.
    """
    alone = replace(run, plan=replace(run.plan, reward=reward))
    data = (run.plan.train, run.plan.held_out)
    scored = [_scored(alone, stored, side, rows) for side, rows in zip(sides, data, strict=True)]
    found = candidate_advantages(alone, f"{name}, {reward_name(reward)}", [each for _, each in scored])
    spread = float(found[0][scored[0][1].positions.live].std()) or 1.0
    sums = []
    for side, (indices, _), value in zip(sides, scored, found, strict=True):
        total = torch.zeros(len(side.positions), NUM_SCORED + 1)
        total[torch.isin(side.positions.replies, indices)] = value / spread
        sums.append(total)
    return sums


def _scored(run: Run, stored: str, side: Side, data: Dataset) -> tuple[Tensor, ScoredPositions]:
    """Return the indices of the replies that the reward has an opinion on, and their scored positions; both stored."""
    rewards: list[float] = []
    indices: list[int] = []
    gains, returns, first = [], [], 0
    for part, replies in side.parts.items():
        found, _ = load_or_compute(run.stored(f"{stored} of {part}"), partial(_score, run, data, side, part))
        rewards += found["rewards"]
        indices += [first + index for index in found["indices"]]
        gains.append(found["gains"])
        returns.append(found["returns"])
        first += len(replies)
    if data is run.plan.train:
        check_differ(rewards)
    generated = side.generated
    positions = Positions.of([generated[index] for index in indices]).narrowed(NUM_SCORED)
    return torch.tensor(indices), ScoredPositions(positions, torch.cat(gains), torch.cat(returns), GAMMA)


def _score(run: Run, data: Dataset, side: Side, part: str) -> dict[str, Any]:
    """Score the replies of a part, whole and unfinished, and report their mean."""
    replies = side.parts[part]
    scores = score_replies(run, data, side.prompts, replies)
    kept, rewards = map(list, zip(*with_opinion(part, replies, scores), strict=True))
    report_mean(run, part, len(replies), rewards)
    indices = [index for index, value in enumerate(scores) if value is not None]
    return {"indices": indices, "rewards": rewards, **scored_parts(run, data, side.prompts, kept, rewards)}
