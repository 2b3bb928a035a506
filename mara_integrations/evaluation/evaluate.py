"""Base model against gate: the same prompts, the same random numbers, every reply kept with what the gate did in it.

Drives the same decoder as serving and scores batch by batch, so that a reward's mistake shows early. Renders nothing.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from typing import Any, TypeAlias

from mara_integrations.data import Dataset, PromptRow, gather_columns, prompt_row
from mara_integrations.engine.candidates import MAX_HAZARD_LOGIT
from mara_integrations.engine.gate import selection_rule
from mara_integrations.engine.generation import FinishReason, GateStats, Generation, Outcome, TracePosition
from mara_integrations.engine.request import Request
from mara_integrations.engine.worker import ThreadTicket, Worker
from mara_integrations.errors import ConfigError, DataError
from mara_integrations.evaluation.metrics import (
    Interval,
    distinct_n,
    opinions,
    paired_bootstrap,
    perplexity,
    perplexity_ratio,
    preference_interval,
    wilson,
    win_counts,
)
from mara_integrations.heads.source import head_name
from mara_integrations.messages import Conversation, Message
from mara_integrations.replies.text import TextStream
from mara_integrations.rewards import CombinedReward, Reward, Scores, reward_name, score
from mara_integrations.runtime import MARAEngine, worker_for
from mara_integrations.sampling import GateParams, SamplingParams

# Where tokens are drawn: push, in nats of log-odds, from which a rejection is put down to the head and not to the dice.
_PUSH = -1.0

Prompts: TypeAlias = Dataset | Sequence[PromptRow | str]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A candidate that was passed over for the token taken.

    Attributes:
        text: Of the token.
        log_prob: Under the base model, in nats.
        accept_logit: What the gate made of it.
        push: What the head added to the base model's own accept logit; None for heads that replace it (`paper`).
        is_by_head: Whether the head was against it. Where tokens are drawn, the base model too passes candidates over.
    """

    text: str
    log_prob: float
    accept_logit: float
    push: float | None
    is_by_head: bool


@dataclass(frozen=True, slots=True)
class Mark:
    """One token of a gated reply.

    Attributes:
        text: What the token added to the reply's text; empty where a character or a stop string is unfinished.
        log_prob: Under the base model, in nats.
        accept_logit: None where the gate was not asked.
        outcome: See `TracePosition`; `base` for a reply at strength 0.
        rejected: Candidates passed over for it, most probable first. With greedy selection the gate also looks ahead
            at less probable ones; `GateStats.rejected` counts those, here they are left out.
    """

    text: str
    log_prob: float
    accept_logit: float | None
    outcome: Outcome
    rejected: tuple[Rejected, ...]


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply, with what each reward says of it."""

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: FinishReason
    scores: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Example:
    """Both replies to one prompt.

    Attributes:
        prompt: The conversation.
        source: The prompt's file and line, or its number.
        seed: Of both replies' random numbers.
        base: At strength 0.
        gated: With the head.
        marks: Token by token of the gated reply.
    """

    prompt: tuple[Message, ...]
    source: str
    seed: int
    base: Reply
    gated: Reply
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class Side:
    """Measures of one side's replies.

    Attributes:
        num_tokens: Of all replies.
        mean_length: In tokens.
        ended: Share of replies that came to their own end before `max_new_tokens`.
        perplexity: Under the base model, pooled over tokens.
        distinct_2: Of token pairs, pooled over replies.
        forwards_per_token: Tokens the model was run on for one token of a reply; what exceeds 1 is the cost of
            the gate, and of drafts that were wrong.
        tokens_per_s: Replies' tokens over wall time, all batches.
    """

    num_tokens: int
    mean_length: float
    ended: float
    perplexity: float
    distinct_2: float
    forwards_per_token: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What one reward says of the two sides; the measures are None where it has no opinion on any pair.

    Attributes:
        num_pairs: Prompts on which it has an opinion on both replies; all else counts only these.
        num_dropped: The other prompts.
        base_mean: Mean reward of the base replies.
        gated_mean: Mean reward of the gated replies.
        difference: gated_mean - base_mean.
        preference: (wins - losses) / num_pairs.
        wins: Prompts on which the gated reply scores higher.
        ties: Prompts on which both score the same.
        losses: Prompts on which the base reply scores higher.
        base_compliance: Share of base replies that score 1, for rewards that say only 0 and 1.
        gated_compliance: The same of the gated replies.
    """

    num_pairs: int
    num_dropped: int
    base_mean: float | None = None
    gated_mean: float | None = None
    difference: Interval | None = None
    preference: Interval | None = None
    wins: int = 0
    ties: int = 0
    losses: int = 0
    base_compliance: Interval | None = None
    gated_compliance: Interval | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Base model against gate.

    Attributes:
        model: Name of the base model.
        head: Where the head came from, see `head_name`.
        form: The head's form.
        strength: Dial on the head.
        sampling: Settings of the gated replies. The base replies share them but for `min_candidates`, which is the
            gate's own need. `seed` is the first prompt's; each next prompt's is one more.
        base: At strength 0.
        gated: With the head.
        perplexity_ratio: Gated over base.
        speed_ratio: Median over batches of the gated side's tokens/s over the base side's, timed in turns in this run.
            Noisy: replies differ in length, and the machine may be busy.
        gate: What the gate did, summed over the gated replies.
        rewards: By name; of a sum of rewards, the sum and each of them.
        examples: Every prompt, in order.
    """

    model: str
    head: str
    form: str
    strength: float
    sampling: SamplingParams
    base: Side
    gated: Side
    perplexity_ratio: Interval
    speed_ratio: float
    gate: GateStats
    rewards: dict[str, Comparison]
    examples: tuple[Example, ...]

    @property
    def extra_forwards(self) -> float:
        """Forwards a token that the gate costs on top of the base model's own."""
        return self.gated.forwards_per_token - self.base.forwards_per_token

    def to_json(self) -> str:
        """Everything, as one JSON object."""
        whole = {field.name: getattr(self, field.name) for field in fields(self)}
        whole["sampling"] = self.sampling.model_dump()
        whole["extra_forwards"] = self.extra_forwards
        whole["examples"] = [
            {**asdict(item), "prompt": [{"role": m.role, "content": m.content} for m in item.prompt]}
            for item in self.examples
        ]
        return json.dumps(whole, default=asdict, ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def evaluate(
    engine: MARAEngine,
    prompts: Prompts,
    rewards: Reward | Mapping[str, Reward] | None = None,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    conversational: bool = False,
    on_progress: Callable[[int], None] | None = None,
    **overrides: Any,
) -> Evaluation:
    """Generate a base and a gated reply to each prompt, and compare them.

    Args:
        engine: With a head.
        prompts: Rows of a data file, or strings, which become user messages.
        rewards: One reward, or several by name; without any, perplexity, diversity and cost are still measured.
        temperature: 0 is greedy: what an application gets by default, and the fair choice for heads of the `paper`
            form, whose own decoding knows no temperature.
        seed: Prompt i draws from seed + i, on both sides; also of the intervals.
        max_new_tokens: Upper bound of a reply, in tokens.
        batch_size: Prompts decoded and scored together.
        conversational: Give rewards lists of messages; implied by a conversational data set, or a prompt of several.
        on_progress: Called with the number of replies just done, of two a prompt.
        **overrides: More settings of `MARAEngine.generate`, as `strength` or `head`.

    Returns:
        The comparison; but for speeds, the forwards spent and the last digits of sums, the same for the same seed.

    Raises:
        ConfigError: If there is no head, a setting is not allowed, or a prompt does not fit the model.
        DataError: If there are no prompts.
        RewardError: If a reward fails; see `rewards.score`.
        ModelError: See `MARAEngine.load`.
        HeadError: See `MARAEngine.load`.
    """
    rows = _rows(prompts)
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size!r} is not allowed", hint="at least 1")
    if isinstance(prompts, Dataset):
        conversational = conversational or prompts.form == "conversational"
    conversational = conversational or any(len(row.prompt) > 1 for row in rows)
    named = _named(rewards)
    settings = {**overrides, "temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed, "trace": True}
    pairs = [_requests(engine, row, {**settings, "seed": seed + i}) for i, row in enumerate(rows)]
    first = pairs[0][1]
    assert first.head is not None, "_requests refuses to go without"

    worker = worker_for(engine.model)
    examples: list[Example] = []
    base_replies: list[Generation] = []
    gated_replies: list[Generation] = []
    seconds: list[tuple[float, float]] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        # Whoever reads the prompts first would read them for the other side too: neither is timed for it.
        _decode(worker, [_requests(engine, row, {**settings, "max_new_tokens": 1})[0] for row in batch])
        spent = []
        for side, replies in enumerate((base_replies, gated_replies)):
            began = time.perf_counter()
            replies.extend(_decode(worker, [pair[side] for pair in pairs[start : start + batch_size]]))
            spent.append(time.perf_counter() - began)
            if on_progress is not None:
                on_progress(len(batch))
        seconds.append((spent[0], spent[1]))
        base = _scored(named, batch, base_replies[start:], conversational)
        gated = _scored(named, batch, gated_replies[start:], conversational)
        for i, row in enumerate(batch):
            marks = token_marks(engine.model.tokenizer, pairs[start + i][1], gated_replies[start + i])
            examples.append(Example(row.prompt, row.source, seed + start + i, base[i], gated[i], marks))

    source = overrides.get("head", engine.head_source)
    return Evaluation(
        model=engine.model.name,
        head=str(head_name(source)),
        form=first.head.config.form,
        strength=first.gate.strength,
        sampling=first.sampling.updated(max_new_tokens=max_new_tokens),
        base=_side(base_replies, sum(base_s for base_s, _ in seconds)),
        gated=_side(gated_replies, sum(gated_s for _, gated_s in seconds)),
        perplexity_ratio=perplexity_ratio(
            [g.log_probs for g in base_replies], [g.log_probs for g in gated_replies], seed
        ),
        speed_ratio=_speed_ratio(base_replies, gated_replies, seconds, batch_size),
        gate=GateStats(*(sum(getattr(g.stats, f.name) for g in gated_replies) for f in fields(GateStats))),
        rewards={
            name: _compared([e.base.scores[name] for e in examples], [e.gated.scores[name] for e in examples], seed)
            for name in examples[0].base.scores
        },
        examples=tuple(examples),
    )


def _rows(prompts: Prompts) -> list[PromptRow]:
    given = prompts.rows if isinstance(prompts, Dataset) else prompts
    rows = []
    for number, item in enumerate(given, start=1):
        if isinstance(item, str):
            rows.append(PromptRow((Message("user", item),), {}, f"prompt {number}"))
        else:
            rows.append(prompt_row(item))
    if not rows:
        raise DataError("there are no prompts to evaluate", hint="give at least one")
    return rows


def _named(rewards: Reward | Mapping[str, Reward] | None) -> dict[str, Reward]:
    if rewards is None:
        return {}
    return dict(rewards) if isinstance(rewards, Mapping) else {reward_name(rewards): rewards}


def _requests(engine: MARAEngine, row: PromptRow, settings: dict[str, Any]) -> tuple[Request, Request]:
    """The base and the gated request for one prompt."""
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


def _decode(worker: Worker, requests: Sequence[Request]) -> list[Generation]:
    tickets = [worker.submit(request, ThreadTicket()) for request in requests]
    try:
        return [next(u.generation for u in ticket if u.generation is not None) for ticket in tickets]
    finally:
        for ticket in tickets:
            ticket.cancel()


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


def _compared(base_scores: Sequence[float | None], gated_scores: Sequence[float | None], seed: int) -> Comparison:
    base, gated, num_dropped = opinions(base_scores, gated_scores)
    n = len(base)
    if n == 0:
        return Comparison(0, num_dropped)
    wins, ties, losses = win_counts(base, gated)
    is_binary = set(base) | set(gated) <= {0.0, 1.0}
    return Comparison(
        num_pairs=n,
        num_dropped=num_dropped,
        base_mean=math.fsum(base) / n,
        gated_mean=math.fsum(gated) / n,
        difference=paired_bootstrap(base, gated, seed),
        preference=preference_interval(base, gated, seed),
        wins=wins,
        ties=ties,
        losses=losses,
        base_compliance=wilson(base.count(1.0), n) if is_binary else None,
        gated_compliance=wilson(gated.count(1.0), n) if is_binary else None,
    )


def _side(generations: Sequence[Generation], seconds: float) -> Side:
    num_tokens = sum(len(g.token_ids) for g in generations)
    return Side(
        num_tokens=num_tokens,
        mean_length=num_tokens / len(generations),
        ended=sum(g.finish_reason == "stop" for g in generations) / len(generations),
        perplexity=perplexity(list(chain.from_iterable(g.log_probs for g in generations))),
        distinct_2=distinct_n([g.token_ids for g in generations], 2),
        forwards_per_token=sum(g.stats.fed for g in generations) / num_tokens,
        tokens_per_s=num_tokens / seconds,
    )


def _speed_ratio(
    base: Sequence[Generation],
    gated: Sequence[Generation],
    seconds: Sequence[tuple[float, float]],
    batch_size: int,
) -> float:
    """Median over batches, so that one disturbed batch does not decide."""
    ratios = []
    for index, (base_s, gated_s) in enumerate(seconds):
        batch = slice(index * batch_size, (index + 1) * batch_size)
        base_tokens, gated_tokens = (sum(len(g.token_ids) for g in side[batch]) for side in (base, gated))
        ratios.append((gated_tokens / gated_s) / (base_tokens / base_s))
    return statistics.median(ratios)


def token_marks(tokenizer: Any, request: Request, generation: Generation) -> tuple[Mark, ...]:
    """What the gate did, token by token, in a reply generated with a head and `trace=True`."""
    assert generation.trace is not None
    assert request.head is not None
    form, temperature = request.head.config.form, request.sampling.temperature
    is_drawn = selection_rule(request.gate.selection, form, temperature) == "sample"
    texts = _pieces(tokenizer, generation)
    marks = []
    for index, (text, position) in enumerate(zip(texts, generation.trace, strict=True)):
        logits = position.accept_logits
        hazard_logits = _hazard_logits(position.log_probs, temperature or 1.0)
        rejected = []
        for k in _rejected(position):
            push = logits[k] - hazard_logits[k] if form != "paper" else None
            token_text = _token_text(tokenizer, generation.token_ids[:index], position.token_ids[k])
            is_by_head = not is_drawn or push is None or push <= _PUSH
            rejected.append(Rejected(token_text, position.log_probs[k], logits[k], push, is_by_head))
        asked = logits[position.taken] if position.taken < len(logits) else None
        marks.append(Mark(text, position.log_probs[position.taken], asked, position.outcome, tuple(rejected)))
    return tuple(marks)


def _rejected(position: TracePosition) -> list[int]:
    """Candidates before the one taken; all others where all were rejected."""
    end = len(position.accept_logits) if position.outcome == "fallback" else position.taken
    return [k for k in range(min(end, len(position.accept_logits))) if k != position.taken]


def _hazard_logits(log_probs: Sequence[float], temperature: float) -> list[float]:
    """`Candidates.hazard_logits` of one position, from all its candidates' log-probabilities."""
    scaled = [log_prob / temperature for log_prob in log_probs]
    logits, after = [MAX_HAZARD_LOGIT], scaled[-1]  # after: log of the mass of all later candidates
    for value in reversed(scaled[:-1]):
        logits.append(max(-MAX_HAZARD_LOGIT, min(value - after, MAX_HAZARD_LOGIT)))
        after = max(value, after) + math.log1p(math.exp(-abs(value - after)))
    return logits[::-1]


def _pieces(tokenizer: Any, generation: Generation) -> list[str]:
    """What each token added to the text: joined, they are the text."""
    stream, pieces, length = TextStream(tokenizer), [], 0
    for token_id in generation.token_ids:
        piece = stream.push(token_id)[: len(generation.text) - length]  # of a stop string nothing is left
        pieces.append(piece)
        length += len(piece)
    pieces[-1] += generation.text[length:]  # held back: it ends in half a character
    return pieces


def _token_text(tokenizer: Any, before: Sequence[int], token_id: int) -> str:
    """A token's text as it would read there; special tokens by their names."""
    alone: str = tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not before:
        return alone
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    known: str = tokenizer.decode([before[-1]], **options)
    both: str = tokenizer.decode([before[-1], token_id], **options)  # some decoders drop a leading space
    return both[len(known) :] if both.startswith(known) and len(both) > len(known) else alone
