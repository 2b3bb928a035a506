"""A finished reply, with the trace and the counts of the gate."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Literal, TypeAlias

from mara_integrations.replies.calls import Call

FinishReason = Literal["stop", "length"]
Outcome = Literal["base", "single", "accepted", "forced", "fallback"]
# Tokens and their log-probabilities, most probable first.
LogProbs: TypeAlias = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TracePosition:
    """The candidates of one position, and the gate's decision.

    Attributes:
        token_ids: Candidates, most probable first.
        log_probs: Log-probabilities of the candidates under the base model, over the whole vocabulary, in nats; under a
            `Constraint` renormalised over the tokens it allows.
        accept_logits: Accept logits of the candidates visited, in visiting order; empty if the gate did not judge.
        taken: Index of the candidate taken.
        outcome: `base`: no gate. `single`: the only candidate, taken without judging. `accepted`: by the gate.
            `forced`: the last one left. `fallback`: taken although all were rejected.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    accept_logits: tuple[float, ...]
    taken: int
    outcome: Outcome


@dataclass(slots=True)
class GateStats:
    """Counts over one reply.

    Attributes:
        accepted: Tokens the gate accepted.
        rejected: Candidates it visited and did not take.
        single: Tokens taken without judging, as the only candidates of their positions.
        forced: Tokens taken as the last candidates left.
        fallbacks: Tokens taken although every candidate was rejected.
        fed: Tokens the model was run on for the reply, rejected and speculative ones included.
    """

    accepted: int = 0
    rejected: int = 0
    single: int = 0
    forced: int = 0
    fallbacks: int = 0
    fed: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished reply.

    Attributes:
        text: The answer, without thoughts, tool calls, special tokens and stop strings; empty where the request asked
            for tokens alone.
        token_ids: Tokens of the reply, its end-of-sequence token included.
        log_probs: Log-probabilities of those tokens under the base model, over the whole vocabulary at temperature 1,
            in nats; under a `Constraint` renormalised over the tokens it allows, so that a token without alternative
            has 0.
        prompt_tokens: Length of the prompt.
        finish_reason: `stop`: end-of-sequence token or stop string. `length`: `max_new_tokens` cut the reply.
        stats: What the gate did.
        trace: What the gate saw and did at each position; None unless the request asked for it.
        thoughts: What a reasoning model thought before its answer, without the marks around it.
        calls: The tool calls of the reply.
        raw_text: The reply as the model wrote it: thoughts, answer and calls with the marks between them.
        alternatives: The most probable tokens at each position, from an engine that has no trace; None unless the
            request asked for them.
    """

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    stats: GateStats
    trace: tuple[TracePosition, ...] | None = None
    thoughts: str = ""
    calls: tuple[Call, ...] = ()
    raw_text: str = ""
    alternatives: tuple[LogProbs, ...] | None = None

    @property
    def completion_tokens(self) -> int:
        """Length of the reply, its end-of-sequence token included."""
        return len(self.token_ids)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: thoughts to unfold, the text, and a line of counts."""
        stats = self.stats
        counts = f"{self.completion_tokens} tokens · finish_reason {self.finish_reason} · {stats.accepted} accepted"
        counts += f" · {stats.rejected} candidates rejected" if stats.rejected else ""
        thoughts = f"<details><summary>thoughts</summary>{escape(self.thoughts)}</details>" if self.thoughts else ""
        return (
            f'<div style="white-space:pre-wrap;max-width:50em;opacity:.75">{thoughts}</div>'
            f'<div style="white-space:pre-wrap;max-width:50em">{escape(self.text)}</div>'
            f'<div style="font-size:85%;opacity:.75">{counts}</div>'
        )
