"""Rewards of replies, or of parts of them, by the run's reward or another one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from mara_integrations.data import Dataset, PromptRow, Row, gather_columns
from mara_integrations.errors import DataError
from mara_integrations.files import write_atomically
from mara_integrations.messages import Conversation
from mara_integrations.rewards import CombinedReward, Reward, Scores, score, trial_of
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import (
    conversation,
    distinct_prompts,
    limited_prompts,
    replies_per_prompt,
)
from mara_integrations.training.context import FAILURE_FILE, Run
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.rollouts.workers import RolloutBatch


def score_replies(
    run: Run,
    data: Dataset,
    prompts: Sequence[Conversation],
    replies: Sequence[Reply],
    texts: Sequence[str] = (),
    *,
    reward: Reward | None = None,
) -> Scores:
    """Return the reward of each reply; None where the reward has no opinion.

    Args:
        run: The run.
        data: Rows of the prompts; their other columns go to the reward.
        prompts: The prompts that `Reply.prompt_index` counts.
        replies: The replies.
        texts: Texts to score in place of the replies' own, as beginnings of them.
        reward: The reward; None is the run's own.
    """
    reward = reward or run.plan.reward
    assert reward is not None
    rows: dict[Conversation, Row] = {conversation(run, row): row for row in data.rows}
    owners = [rows[prompts[reply.prompt_index]] for reply in replies]
    with _stored_scales(run):
        return score(
            reward,
            [row.prompt for row in owners],
            texts or [reply.text for reply in replies],
            completion_ids=[reply.token_ids for reply in replies],
            columns=gather_columns([row for row in owners if isinstance(row, PromptRow)]),
            conversational=data.form == "conversational",
            timeout_s=run.config.reward_timeout_s,
            failure_file=run.config.output / FAILURE_FILE,
            on_parts=partial(_log_parts, run) if isinstance(reward, CombinedReward) and not texts else None,
        )


def rewarded_replies(run: Run, stage: str, data: Dataset, seed: int) -> tuple[list[Reply], list[float]]:
    """Return base replies to the prompts of data, and their rewards; without replies the reward has no opinion on."""
    prompts = limited_prompts(run, data)
    replies = generate_replies(run, stage, prompts, replies_per_prompt(run), seed)
    rewarded = with_opinion(stage, replies, score_replies(run, data, prompts, replies))
    report_mean(run, stage, len(replies), [reward for _, reward in rewarded])
    return [reply for reply, _ in rewarded], [reward for _, reward in rewarded]


def with_opinion(stage: str, replies: Sequence[Reply], scores: Scores) -> list[tuple[Reply, float]]:
    """Return the replies that a reward has an opinion on, with their scores.

    Raises:
        DataError: If it has an opinion on none.
    """
    found = [(reply, value) for reply, value in zip(replies, scores, strict=True) if value is not None]
    if not found:
        raise DataError(f"the reward had no opinion on any of {len(replies)} {stage}", hint="check the reward function")
    return found


def check_differ(rewards: Sequence[float]) -> None:
    """Refuse rewards that are all equal.

    Raises:
        DataError: If they are.
    """
    if len(set(rewards)) == 1:
        raise DataError(
            f"the reward gave every reply {rewards[0]}: nothing to learn from", hint="check the reward function"
        )


def report_mean(run: Run, stage: str, num_replies: int, rewards: Sequence[float]) -> None:
    """Log and say the mean reward of a stage's replies."""
    mean = sum(rewards) / len(rewards)
    run.log("rewards", stage=stage, replies=num_replies, scored=len(rewards), mean_reward=mean)
    run.say(f"  mean reward of {len(rewards)} {stage}: {mean:+.3f}")


def check_reward(run: Run) -> None:
    """Score two short replies, so that a mistake in the reward shows before the work; store nothing."""
    prompts = distinct_prompts(run, run.plan.train)[:2]
    replies = RolloutBatch(prompts, run.sampling(max_new_tokens=8), run.config.seed).generate(run.model, run.backend)
    assert run.plan.reward is not None
    score_replies(run, run.plan.train, prompts, replies, reward=trial_of(run.plan.reward))


@contextmanager
def _stored_scales(run: Run) -> Iterator[None]:
    """Store the scales that a normalised reward takes from its first batch, so that a resumed run uses the same."""
    reward, file = run.plan.reward, run.folder / "reward-scales.json"
    if not isinstance(reward, CombinedReward) or not reward.normalise:
        yield
        return
    with suppress(OSError, ValueError):  # absent or damaged
        stored = json.loads(file.read_text())
        reward.scales.update({name: (mean, deviation) for name, (mean, deviation) in stored.items()})
    known = dict(reward.scales)
    yield
    if reward.scales != known:
        write_atomically(file, json.dumps(reward.scales))


def _log_parts(run: Run, parts: Mapping[str, Scores]) -> None:
    """Log the mean of each of several rewards."""
    scored = {name: [score for score in scores if score is not None] for name, scores in parts.items()}
    run.log("reward parts", **{name: sum(scores) / len(scores) for name, scores in scored.items() if scores})
