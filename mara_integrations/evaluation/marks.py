"""Marks of a gated reply, token by token: what was rejected, what was taken, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mara_integrations.engine.candidates import MAX_HAZARD_LOGIT
from mara_integrations.engine.gate import selection_rule
from mara_integrations.engine.generation import Generation, Outcome, TracePosition
from mara_integrations.engine.request import Request
from mara_integrations.replies.text import TextStream

# Where tokens are drawn, a rejection is the head's if it lowers the log-odds by this many nats, else chance.
_PUSH = -1.0


@dataclass(frozen=True, slots=True)
class Rejected:
    """A candidate that was passed over for the token taken.

    Attributes:
        text: Text of the token.
        log_prob: Under the base model, in nats.
        accept_logit: Accept logit under the gate.
        push: Amount by which the head moved the base model's accept logit, in nats; None for the form `paper`.
        is_by_head: Whether the head caused the rejection. Where tokens are drawn, chance passes candidates over too.
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


def token_marks(tokenizer: Any, request: Request, generation: Generation) -> tuple[Mark, ...]:
    """Return the marks of a reply that was generated with a head and `trace=True`, one a token."""
    assert generation.trace is not None
    assert request.head is not None
    form, temperature = request.head.config.form, request.sampling.temperature
    is_drawn = selection_rule(request.gate.selection, form, temperature) == "sample"
    shown = request.text.shown if isinstance(request.text, TextStream) else ()
    texts = _pieces(TextStream(tokenizer, shown=shown), generation)
    marks = []
    for index, (text, position) in enumerate(zip(texts, generation.trace, strict=True)):
        logits = position.accept_logits
        hazards = hazard_logits(position.log_probs, temperature or 1.0)
        rejected = []
        for k in rejected_candidates(position):
            push = logits[k] - hazards[k] if form != "paper" else None
            token_text = _token_text(tokenizer, generation.token_ids[:index], position.token_ids[k])
            is_by_head = not is_drawn or push is None or push <= _PUSH
            rejected.append(Rejected(token_text, position.log_probs[k], logits[k], push, is_by_head))
        asked = logits[position.taken] if position.taken < len(logits) else None
        marks.append(Mark(text, position.log_probs[position.taken], asked, position.outcome, tuple(rejected)))
    return tuple(marks)


def rejected_candidates(position: TracePosition) -> list[int]:
    """Candidates before the one taken; all others where all were rejected."""
    end = len(position.accept_logits) if position.outcome == "fallback" else position.taken
    return [k for k in range(min(end, len(position.accept_logits))) if k != position.taken]


def hazard_logits(log_probs: Sequence[float], temperature: float) -> list[float]:
    """`Candidates.hazard_logits` of one position, from all its candidates' log-probabilities."""
    scaled = [log_prob / temperature for log_prob in log_probs]
    logits, after = [MAX_HAZARD_LOGIT], scaled[-1]  # after: log of the mass of all later candidates
    for value in reversed(scaled[:-1]):
        logits.append(max(-MAX_HAZARD_LOGIT, min(value - after, MAX_HAZARD_LOGIT)))
        after = max(value, after) + math.log1p(math.exp(-abs(value - after)))
    return logits[::-1]


def _pieces(stream: TextStream, generation: Generation) -> list[str]:
    """Return the text that each token added; joined, the pieces are the raw text."""
    pieces, length = [], 0
    for token_id in generation.token_ids:
        piece = stream.push(token_id)[: len(generation.raw_text) - length]  # of a stop string nothing is left
        pieces.append(piece)
        length += len(piece)
    pieces[-1] += generation.raw_text[length:]  # held back: it ends in half a character
    return pieces


def _token_text(tokenizer: Any, before: Sequence[int], token_id: int) -> str:
    """Return a token's text as it reads after `before`; special tokens by their names."""
    alone: str = tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not before:
        return alone
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    known: str = tokenizer.decode([before[-1]], **options)
    both: str = tokenizer.decode([before[-1], token_id], **options)  # some decoders drop a leading space
    return both[len(known) :] if both.startswith(known) and len(both) > len(known) else alone
