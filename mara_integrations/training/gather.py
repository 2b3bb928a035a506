"""Replies for a run to learn from: written by the model or brought by the data, with what a reward says of them.

All are kept on disk in parts as they come, so that an interrupted run goes on where it was. Those of the base model do
not depend on what is taught: they are kept in the platform's cache, and one bank serves every reward.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

from torch import Tensor

from mara_integrations.data import Dataset, Labelled, Pair, PromptRow, Row, gather_columns
from mara_integrations.errors import DataError
from mara_integrations.files import write_atomically
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Conversation
from mara_integrations.rewards import CombinedReward, Reward, Scores, score
from mara_integrations.training.context import Run
from mara_integrations.training.records.store import (
    as_dict,
    cache_file,
    load_or_compute,
    load_or_generate,
    load_or_generate_cached,
)
from mara_integrations.training.rollouts.decisions import Decisions, read_decisions
from mara_integrations.training.rollouts.replies import Reply, read_replies
from mara_integrations.training.rollouts.writers import Ahead, Part

FAILURE_FILE = "reward-failure.json"
_READ_PART = 256  # replies between two files of an interrupted run
_FEWEST_HELD_OUT = 8  # prompts
_LIVE = 64  # replies written at once: one part

Written: TypeAlias = tuple[int, Conversation, str]  # prompt index, prompt, reply


def prompts_of(run: Run, data: Dataset) -> list[Conversation]:
    """Distinct prompts in order, with the run's system prompt."""
    return list(dict.fromkeys(conversation_of(run, row) for row in data.rows))


def limited_prompts(run: Run, data: Dataset, each: int = 1) -> list[Conversation]:
    """As many of the prompts as may get `each` replies, of held-out ones their share of that, chosen by seed."""
    prompts, most = prompts_of(run, data), max(1, run.max_replies // each)
    if data is run.plan.held_out or data is run.plan.prompts[1]:
        most = max(_FEWEST_HELD_OUT, math.ceil(most * run.config.held_out))
    if len(prompts) <= most:
        return prompts
    run.say(f"  using {most} of {len(prompts)} prompts (--max-replies)")
    return run.random().sample(prompts, most)


def replies_each(run: Run) -> int:
    """Replies to each prompt, as the settings say or `max_replies` allows, at most 4."""
    return run.config.replies_each or max(1, min(4, run.max_replies // len(prompts_of(run, run.plan.prompts[0]))))


def sample(
    run: Run,
    name: str,
    prompts: Sequence[Conversation],
    each: int,
    seed: int,
    head: MARAHead | None = None,
    *,
    is_base: bool = False,
) -> list[Reply]:
    """Replies written by the model, gated where a head is given; prompt by prompt, `each` to every one.

    Prompts of like lengths are written together: what is written beside a long one waits for its attention.

    Args:
        run: The run.
        name: Of the stage, no other of the run has it.
        prompts: With the system prompt.
        each: Replies to each prompt.
        seed: Reply j to the i-th shortest prompt draws from seed + i * each + j.
        head: What it is shown is kept too.
        is_base: The head is an untrained one, there only to have the candidates kept that the base model passes over.
    """
    size = max(1, _LIVE // each)
    order = sorted(range(len(prompts)), key=lambda i: len(run.model.encoder.encode(prompts[i])))
    sampling = run.sampling(**({"min_candidates": head.config.min_candidates} if head else {}))
    parts = [
        Part([prompts[i] for i in order[start : start + size]], sampling, seed + start * each, each, head)
        for start in range(0, len(prompts), size)
    ]
    if head is None or is_base:
        files = [cache_file(_key(run, part)) for part in parts]
    else:
        files = [run.folder / f"{name.replace(' ', '-')}-{i * size}.pt" for i in range(len(parts))]
    replies: list[Reply] = []
    with run.stage(name, len(prompts) * each) as advance:
        ahead = Ahead(run.writers, parts, advance)
        for i, file in enumerate(files):
            ahead.begin(k for k in range(i, min(i + run.writers.width, len(parts))) if not files[k].exists())
            load_or = load_or_generate_cached if head is None or is_base else load_or_generate
            written, was_kept = load_or(file, partial(ahead.collect, i))
            if was_kept:
                advance(len(written))
            for reply in written:
                reply.prompt = order[i * size + reply.prompt]
            replies += written
    return sorted(replies, key=lambda reply: reply.prompt)


def _key(run: Run, part: Part) -> str:
    """Names base replies by all that decides them: the model, its device, the prompts' tokens, how they are drawn."""
    parts = [
        run.model_fingerprint,
        str(run.model.device.type),
        [run.model.encoder.encode(prompt) for prompt in part.prompts],
        [run.model.encoder.stop_for(prompt) for prompt in part.prompts],
        part.sampling.model_dump(mode="json"),
        part.replies_each,
        part.seed,
        part.head is not None,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()[:32]


def read(run: Run, name: str, texts: Sequence[Written]) -> list[Reply]:
    """Replies that were written already, with the states the model has while reading them."""
    read_part = partial(read_replies, run.model, run.backend, max_tokens=run.config.max_reply_tokens)
    replies: list[Reply] = []
    with run.stage(name, len(texts)) as advance:
        for start in range(0, len(texts), _READ_PART):
            gather = partial(read_part, texts[start : start + _READ_PART], on_reply=advance)
            part, was_kept = load_or_generate(run.folder / f"{name.replace(' ', '-')}-{start}.pt", gather)
            if was_kept:
                advance(len(part))
            replies += part
    return replies


def read_as_decisions(run: Run, name: str, texts: Sequence[Written], max_competitors: int) -> Decisions:
    """Replies that were written already as the decisions that write them; see `decisions.read_decisions`."""
    parts = []
    with run.stage(name, len(texts)) as advance:
        for start in range(0, len(texts), _READ_PART):
            read_part = partial(
                read_decisions,
                run.model,
                run.backend,
                texts[start : start + _READ_PART],
                sampling=run.sampling(),
                max_competitors=max_competitors,
                on_reply=advance,
            )
            path = run.folder / f"{name.replace(' ', '-')}-{start}.pt"
            part, was_kept = load_or_compute(path, partial(_plain, read_part))
            parts.append(Decisions(**part))
            if was_kept:
                advance(len(parts[-1]))
    return Decisions.join(parts)


def _plain(read_part: Callable[[], Decisions]) -> dict[str, Tensor]:
    return as_dict(read_part())


def written_replies(run: Run, data: Dataset) -> tuple[list[Written], list[float]]:
    """The replies that data brings, and their labels: 1 for a good one, 0 for a bad one."""
    texts: list[Written] = []
    labels: list[float] = []
    index = {prompt: i for i, prompt in enumerate(prompts_of(run, data))}
    for row in data.rows:
        prompt = conversation_of(run, row)
        fields = {Pair: ("chosen", "rejected"), Labelled: ("completion",), PromptRow: ()}[type(row)]
        for field in fields:
            texts.append((index[prompt], prompt, getattr(row, field)))
            labels.append(float(row.label if isinstance(row, Labelled) else field == "chosen"))
    return texts, labels


def rewarded(run: Run, name: str, data: Dataset, seed: int) -> tuple[list[Reply], list[float]]:
    """Base replies to the prompts and what the reward says of them; those it has no opinion on are left out."""
    prompts = limited_prompts(run, data)
    replies = sample(run, name, prompts, replies_each(run), seed)
    worth = scores(run, data, prompts, replies)
    judged = [(reply, value) for reply, value in zip(replies, worth, strict=True) if value is not None]
    if not judged:
        raise DataError(f"the reward had no opinion on any of {len(replies)} {name}", hint="check the reward function")
    mean = sum(value for _, value in judged) / len(judged)
    run.log("rewards", stage=name, replies=len(replies), judged=len(judged), mean_reward=mean)
    run.say(f"  mean reward of {len(judged)} {name}: {mean:+.3f}")
    return [reply for reply, _ in judged], [value for _, value in judged]


def scores(
    run: Run,
    data: Dataset,
    prompts: Sequence[Conversation],
    replies: Sequence[Reply],
    texts: Sequence[str] = (),
    *,
    reward: Reward | None = None,
) -> list[float | None]:
    """What a reward says of replies.

    Args:
        run: The run.
        data: Where the prompts come from; brings the other columns.
        prompts: That `Reply.prompt` counts.
        replies: To judge.
        texts: Judged in place of the replies' own texts, as parts of them.
        reward: Left out, the run's own.
    """
    reward = reward or run.plan.reward
    assert reward is not None
    rows: dict[Conversation, Row] = {conversation_of(run, row): row for row in data.rows}
    owners = [rows[prompts[reply.prompt]] for reply in replies]
    with _scales_kept(run):
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


@contextmanager
def _scales_kept(run: Run) -> Iterator[None]:
    """Keep the scales that a normalised reward takes from its first batch, so that a resumed run judges by the same."""
    reward, file = run.plan.reward, run.folder / "reward-scales.json"
    if not isinstance(reward, CombinedReward) or not reward.normalise:
        yield
        return
    if file.exists():
        reward.scales.update(
            {name: (mean, deviation) for name, (mean, deviation) in json.loads(file.read_text()).items()}
        )
    known = dict(reward.scales)
    yield
    if reward.scales != known:
        write_atomically(file, json.dumps(reward.scales))


def _log_parts(run: Run, parts: Mapping[str, Scores]) -> None:
    """A curve for each of several rewards."""
    opinions = {name: [score for score in scores if score is not None] for name, scores in parts.items()}
    run.log("reward parts", **{name: sum(given) / len(given) for name, given in opinions.items() if given})


def try_reward(run: Run) -> None:
    """Ask the reward about two short replies, so that its mistakes come out before the work, and leave nothing."""
    prompts = prompts_of(run, run.plan.train)[:2]
    sampling = run.sampling(max_new_tokens=8)
    replies = Part(prompts, sampling, run.config.seed).write(run.model, run.backend)
    scores(run, run.plan.train, prompts, replies)


def conversation_of(run: Run, row: Row) -> Conversation:
    """A row's prompt as the model gets it: with its tools, and with the run's system prompt."""
    return Conversation(row.prompt, row.tools).with_system(run.config.system_prompt)
