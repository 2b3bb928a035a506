"""Base model against gate: the same prompts, the same random numbers, every reply kept with what the gate did in it.

Drives the same decoder as serving and scores batch by batch, so that a reward's mistake shows early. Renders nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

from mara_integrations.data import Dataset, PromptRow, Row, gather_columns, prompt_row, read_prompts
from mara_integrations.engine.generation import GateStats, Generation
from mara_integrations.engine.request import Request
from mara_integrations.engine.tickets import ThreadTicket
from mara_integrations.engine.worker import Worker
from mara_integrations.errors import ConfigError, DataError
from mara_integrations.evaluation.comparison import compare, side_of
from mara_integrations.evaluation.marks import token_marks
from mara_integrations.evaluation.metrics import perplexity_ratio
from mara_integrations.evaluation.results import Evaluation, Example, Reply
from mara_integrations.heads.source import head_name
from mara_integrations.messages import Conversation, Message
from mara_integrations.rewards import CombinedReward, Reward, Scores, reward_name, score
from mara_integrations.runtime import MARAEngine, worker_for
from mara_integrations.sampling import GateParams, SamplingParams

# A data file, or what stands for its rows: dicts, a `datasets.Dataset`, a DataFrame, a `data.Dataset`; or strings.
Prompts: TypeAlias = Any
Rewards: TypeAlias = Reward | Sequence[Reward] | Mapping[str, Reward]


def evaluate(
    engine: MARAEngine,
    prompts: Prompts,
    rewards: Rewards | None = None,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 128,
    batch_size: int = 64,
    conversational: bool = False,
    on_progress: Callable[[int], None] | None = None,
    **overrides: Any,
) -> Evaluation:
    """Generate a base and a gated reply to each prompt, and compare them.

    Args:
        engine: With a head.
        prompts: A list of strings, which become user messages; or rows, as `data.read_prompts` takes
            them: dicts, a `datasets.Dataset`, a DataFrame, or the name of a file.
        rewards: One reward, a list, or several by name; without any, perplexity, diversity and cost are still measured.
        temperature: 0 is greedy: what an application gets by default, and the fair choice for heads of the `paper`
            form, whose own decoding knows no temperature.
        seed: Prompt i draws from seed + i, on both sides; also of the intervals.
        max_new_tokens: Upper bound of a reply, in tokens.
        batch_size: Prompts decoded and scored together.
        conversational: Give rewards lists of messages; implied by a conversational data set, or a prompt of several.
        on_progress: Called with the number of replies just done, of two a prompt: 1, each time.
        **overrides: More settings of `MARAEngine.generate`, as `strength` or `head`.

    Returns:
        The comparison; but for speeds, the forwards spent and the last digits of sums, the same for the same seed.

    Raises:
        ConfigError: If there is no head, a setting is not allowed, or a prompt does not fit the model.
        DataError: If there are no prompts, or a row is bad.
        RewardError: If a reward fails; see `rewards.score`.
        ModelError: See `MARAEngine.load`.
        HeadError: See `MARAEngine.load`.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size!r} is not allowed", hint="at least 1")
    dataset = _dataset(prompts)
    rows = [prompt_row(row) for row in dataset.rows]
    conversational = conversational or dataset.form == "conversational" or any(len(row.prompt) > 1 for row in rows)
    named = _named(rewards)
    settings = {**overrides, "temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed, "trace": True}
    pairs = [_requests(engine, row, {**settings, "seed": seed + i}) for i, row in enumerate(rows)]
    first = pairs[0][1]
    assert first.head is not None, "_requests refuses to go without"

    worker = worker_for(engine.model)
    examples: list[Example] = []
    base_replies: list[Generation] = []
    gated_replies: list[Generation] = []
    seconds = [0.0, 0.0]
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        # Whoever reads the prompts first would read them for the other side too: neither is timed for it.
        _decode(worker, [_requests(engine, row, {**settings, "max_new_tokens": 1})[0] for row in batch])
        for side, replies in enumerate((base_replies, gated_replies)):
            began = time.perf_counter()
            replies.extend(_decode(worker, [pair[side] for pair in pairs[start : start + batch_size]], on_progress))
            seconds[side] += time.perf_counter() - began
        base = _scored(named, batch, base_replies[start:], conversational)
        gated = _scored(named, batch, gated_replies[start:], conversational)
        for i, row in enumerate(batch):
            marks = token_marks(engine.model.tokenizer, pairs[start + i][1], gated_replies[start + i])
            examples.append(Example(row.prompt, row.source, seed + start + i, base[i], gated[i], marks))

    source = overrides.get("head", engine.head_source)
    base_side, gated_side = side_of(base_replies, seconds[0]), side_of(gated_replies, seconds[1])
    return Evaluation(
        model=engine.model.name,
        head=str(head_name(source)),
        form=first.head.config.form,
        strength=first.gate.strength,
        sampling=first.sampling.updated(max_new_tokens=max_new_tokens),
        base=base_side,
        gated=gated_side,
        perplexity_ratio=perplexity_ratio(
            [g.log_probs for g in base_replies], [g.log_probs for g in gated_replies], seed
        ),
        speed_ratio=gated_side.tokens_per_s / base_side.tokens_per_s,
        gate=GateStats(*(sum(getattr(g.stats, f.name) for g in gated_replies) for f in fields(GateStats))),
        rewards={
            name: compare(
                [e.base.scores[name] for e in examples],
                [e.gated.scores[name] for e in examples],
                [e.is_changed for e in examples],
                seed,
            )
            for name in examples[0].base.scores
        },
        examples=tuple(examples),
    )


def _dataset(prompts: Prompts) -> Dataset:
    """Return the rows of prompts in any form.

    Raises:
        DataError: If there are none.
    """
    if not isinstance(prompts, str) and isinstance(prompts, Sequence):
        rows = [
            PromptRow((Message("user", item),), {}, f"prompt {number}") if isinstance(item, str) else item
            for number, item in enumerate(prompts, start=1)
        ]
        if all(isinstance(row, Row) for row in rows):
            prompts = Dataset("prompts", tuple(map(prompt_row, rows)), Path("<prompts>"))
    dataset = prompts if isinstance(prompts, Dataset) else read_prompts(prompts)
    if not dataset.rows:
        raise DataError("there are no prompts to evaluate", hint="give at least one")
    return dataset


def _named(rewards: Rewards | None) -> dict[str, Reward]:
    if rewards is None:
        return {}
    if isinstance(rewards, Mapping):
        return dict(rewards)
    several = list(rewards) if isinstance(rewards, Sequence) else [rewards]
    named = {reward_name(reward): reward for reward in several}
    if len(named) < len(several):
        raise ConfigError("two rewards have the same name", hint="give them as a dict, by names of your own")
    return named


def _requests(engine: MARAEngine, row: PromptRow, settings: dict[str, Any]) -> tuple[Request, Request]:
    """Return the base and the gated request for one prompt."""
    _check(settings)
    try:
        prompt = Conversation(row.prompt, row.tools)
        gated = engine.request(prompt, **settings)
        # A head brings the candidates and the system prompt it was trained with; without them, the base model's reply
        # would differ by more than the head.
        resolved = engine.resolve(**settings)
        shared = {
            "top_k": resolved.sampling.top_k,
            "top_p": resolved.sampling.top_p,
            "system_prompt": resolved.system_prompt or "",
        }
        base = engine.request(prompt, **{**settings, **shared, "strength": 0.0, "trace": False})
    except ConfigError as error:
        raise ConfigError(f"{row.source}: {error.message}", hint=error.hint) from None
    if gated.head is None:
        raise ConfigError("there is no head to evaluate", hint="give the engine one: MARAEngine(model, head=...)")
    return base, gated


def _check(settings: Mapping[str, Any]) -> None:
    """Refuse a bad value for its own sake, before a prompt is blamed for it."""
    for params in (SamplingParams, GateParams):
        params.of(**{name: value for name, value in settings.items() if name in params.model_fields})


def _decode(
    worker: Worker, requests: Sequence[Request], on_progress: Callable[[int], None] | None = None
) -> list[Generation]:
    tickets = [worker.submit(request, ThreadTicket()) for request in requests]
    generations = []
    try:
        for ticket in tickets:
            generations.append(next(u.generation for u in ticket if u.generation is not None))
            if on_progress is not None:
                on_progress(1)
    finally:
        for ticket in tickets:
            ticket.cancel()
    return generations


def _scored(
    rewards: Mapping[str, Reward], rows: Sequence[PromptRow], generations: Sequence[Generation], conversational: bool
) -> list[Reply]:
    scores: dict[str, Scores] = {}
    for name, reward in rewards.items():
        scores[name] = []  # before its parts
        scores[name] = score(
            reward,
            [row.prompt for row in rows],
            [generation.text for generation in generations],
            completion_ids=[generation.token_ids for generation in generations],
            columns=gather_columns(rows),
            conversational=conversational,
            on_parts=scores.update if isinstance(reward, CombinedReward) else None,
        )
    return [
        Reply(g.text, g.token_ids, g.log_probs, g.finish_reason, {name: scores[name][i] for name in scores})
        for i, g in enumerate(generations)
    ]
