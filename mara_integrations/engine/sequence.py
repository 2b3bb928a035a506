"""One request from its prompt to its last token: what it asks of the next forward, what was decided, why it ended."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from mara_integrations.engine.backend import Segment
from mara_integrations.engine.drafts import NgramDraft
from mara_integrations.engine.gate import Rule, Verdict, accept_logit, decide, selection_rule
from mara_integrations.engine.heads import Head
from mara_integrations.sampling import GateParams, SamplingParams

FinishReason = Literal["stop", "length"]
Outcome = Literal["base", "single", "accepted", "forced", "fallback"]


class Constraint(Protocol):
    """What a reply may be, token by token."""

    def mask(self, logits: Tensor) -> None:
        """Set the logits of tokens that may not come next to -inf, in place, shape (V,)."""

    def accept(self, token_id: int) -> None:
        """The gate took this token."""

    def certain(self) -> Seq[int]:
        """Tokens that come next whatever the model says, where that is known ahead."""
        return ()

    @property
    def is_cut_short(self) -> bool:
        """Whether the reply was brought to its end before `max_new_tokens`, other than the model would have."""
        return False


class TextFollower(Protocol):
    """What hears of a reply token by token, all but its end-of-sequence token, and may end it; `TextStream` is one."""

    text: str
    stopped: bool

    def push(self, token_id: int) -> object:
        """Hear of a token; `stopped` says afterwards whether it was the last."""

    def finish(self) -> object:
        """No token follows."""


@dataclass(slots=True, eq=False)
class Request:
    """What is asked of the decoder.

    Attributes:
        prompt_ids: At least one token.
        head: None for the base model.
        eos_token_ids: Tokens that end the reply; the one that did is part of it.
        text: Follows the reply's text, and ends it at a stop string; None where only tokens matter.
        constraint: Masks the logits before candidates are chosen; the head judges what is left.
        keep_states: Keep the hidden state of the last prompt token and of every reply token, for training.
        keep_positions: Keep what the head was shown at each position it judged, for training.
    """

    prompt_ids: Seq[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    gate: GateParams = field(default_factory=GateParams)
    head: Head | None = None
    eos_token_ids: frozenset[int] = frozenset()
    text: TextFollower | None = None
    constraint: Constraint | None = None
    keep_states: bool = False
    keep_positions: bool = False


@dataclass(frozen=True, slots=True)
class TracePosition:
    """What the gate saw and did at one position.

    Attributes:
        token_ids: Candidates, most probable first.
        log_probs: Of the candidates under the base model, whole vocabulary, in nats; under a `Constraint` renormalised
            over the tokens it allows.
        accept_logits: Of the candidates visited, in visiting order; empty where the gate was not asked.
        taken: Index of the candidate taken.
        outcome: `base`: no gate. `single`: the only candidate, taken unasked. `accepted`. `forced`: the last one left.
            `fallback`: all were rejected.
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
        single: Tokens taken unasked, the only candidates of their positions.
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
        text: Without special tokens and stop strings; empty where the request followed no text.
        token_ids: Of the reply, its end-of-sequence token included.
        log_probs: Of those tokens under the base model, whole vocabulary at temperature 1, in nats; under a
            `Constraint` renormalised over the tokens it allows, so that a token without alternative has 0.
        prompt_tokens: Length of the prompt.
        finish_reason: `stop`: end-of-sequence token or stop string. `length`: `max_new_tokens`, also where a
            `Constraint` brought the reply to an end that fits them.
        stats: What the gate did.
        trace: Position by position, on request.
    """

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    stats: GateStats
    trace: tuple[TracePosition, ...] | None = None


@dataclass(slots=True)
class Position:
    """The candidates of the next token, and what is known of them so far."""

    token_ids: list[int]
    log_probs: list[float]
    hazard_logits: list[float]
    uniform: float
    accept_logits: list[float] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)  # of the candidates fed, each (d,)


class Look(NamedTuple):
    """Ranked candidates of one position, without padding; see `Candidates`."""

    token_ids: list[int]
    log_probs: list[float]
    hazard_logits: list[float]


class FedAhead(NamedTuple):
    """A drafted token that was fed behind tokens not settled yet.

    Attributes:
        score: Of the head; None where no gate is asked.
        state: Shape (d,).
    """

    token_id: int
    score: float | None
    state: Tensor


@dataclass(slots=True)
class JudgedPosition:
    """What a head was shown at one position.

    Attributes:
        index: Place of the position in the reply.
        token_ids: Candidates, K of them.
        hazard_logits: Of the candidates, K.
        states: Of the candidates that were fed, in order, (F, d).
        previous: Of the last token before, (d,).
    """

    index: int
    token_ids: list[int]
    hazard_logits: list[float]
    states: Tensor
    previous: Tensor


class Sequence:
    """State of one live request.

    It alternates between tokens that are settled but not yet fed (`pending`: the prompt, later a token taken unasked)
    and a `position` whose candidates are being fed as siblings. Drafted tokens may be fed behind either; one is kept if
    it is what is taken in its place.
    """

    def __init__(self, request: Request, row: int, num_known: int = 0) -> None:
        self.request = request
        self.row = row
        self.gated = request.head is not None and request.gate.strength > 0
        form = request.head.config.form if request.head and self.gated else None
        self.rule: Rule = selection_rule(request.gate.selection if form else "auto", form, self.temperature)
        self.pending: list[int] = list(request.prompt_ids[num_known:])  # the row was opened with the others
        self.draft: list[int] = []  # at the end of what was proposed last
        self.ahead: list[FedAhead] = []
        self._drafts = NgramDraft(request.prompt_ids)
        self.position: Position | None = None
        self.tip: Tensor | None = None  # hidden state of the last committed token, (d,)
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.states: list[Tensor] = []
        self.positions: list[JudgedPosition] = []
        self.trace: list[TracePosition] = []
        self.stats = GateStats()
        self.finish_reason: FinishReason | None = None
        self.cancelled = False
        self._random = random.Random(request.sampling.seed)

    @property
    def temperature(self) -> float:
        """That of the candidates; inert for a head of the paper's form, as published."""
        head = self.request.head
        return 0.0 if self.gated and head and head.config.form == "paper" else self.request.sampling.temperature

    @property
    def is_prefilling(self) -> bool:
        """Its prompt is not all fed yet."""
        return bool(self.pending) and not self.token_ids

    @property
    def is_waiting(self) -> bool:
        """Something still has to be fed for it."""
        if self.cancelled:
            return False
        return self.finish_reason is None or (self.request.keep_states and bool(self.pending))

    def propose(self, width: int, chunk: int, num_drafted: int = 0) -> Segment:
        """What to feed next: up to `chunk` pending tokens, or up to `width` more candidates.

        Where the text seems to repeat itself, one token that is taken or likely to be, and up to `num_drafted` behind
        it, as one chain.
        """
        self.draft = self._drafted(num_drafted)
        if self.pending:
            return Segment(self.row, [*self.pending[:chunk], *self.draft])
        assert self.position is not None
        fed = len(self.position.states)
        if self.draft:
            return Segment(self.row, [self.position.token_ids[0], *self.draft])
        return Segment(self.row, self.position.token_ids[fed : fed + width], siblings=True)

    def _drafted(self, num_drafted: int) -> list[int]:
        num_drafted = min(num_drafted, self.request.sampling.max_new_tokens - len(self.token_ids) - 1)
        if num_drafted < 1 or self.is_prefilling or self.request.constraint is not None:
            return []  # what a constraint allows is known only once the tokens before are settled
        if self.position is None:
            return self._drafts.propose((), num_drafted)
        return [] if self.position.states else self._drafts.propose(self.position.token_ids[:1], num_drafted)

    def follow(self, looks: Seq[Look]) -> tuple[int, bool]:
        """Open the next position, and settle it and those after it as far as their tokens were fed ahead.

        Args:
            looks: At the position after the last settled token, and after each of `ahead`.

        Returns:
            How many tokens at the end were fed in vain, and whether the first of them is the first candidate of the
            position that is open now.
        """
        ahead, self.ahead = self.ahead, []
        num_kept, held = 0, False
        for look in looks:
            self.open_position(*look)
            if num_kept == len(ahead):
                break
            fed = ahead[num_kept]
            if fed.token_id != (self.token_ids[-1] if self.position is None else self.position.token_ids[0]):
                break
            if self.position is None:  # taken unasked, and fed already
                self.pending, self.tip = [], fed.state
            else:
                assert fed.score is not None, "a gated sequence shows all it feeds to its head"
                held = self.judge([fed.score], fed.state[None]) is None
                if held:
                    break
            num_kept += 1
            self.keep_state()
            if self.finish_reason is not None:
                break
        if ahead:
            self._drafts.observe(num_kept, len(ahead))
        return len(ahead) - num_kept, held

    def keep_state(self) -> None:
        """Keep the tip for training, if the request asks for it."""
        if self.request.keep_states:
            assert self.tip is not None
            self.states.append(self.tip.clone())

    def open_position(self, token_ids: list[int], log_probs: list[float], hazard_logits: list[float]) -> None:
        """Look at ranked candidates; where there is nothing to ask, take one at once."""
        position = Position(token_ids, log_probs, hazard_logits, self._random.random())
        if len(token_ids) == 1:
            self._take(position, 0, "single")
        elif not self.gated:
            verdict = decide(hazard_logits, len(token_ids), self.rule, "first", position.uniform)
            assert verdict is not None
            self._take(position, verdict.taken, "base")
        else:
            self.position = position
            return
        self.pending = self.token_ids[-1:]
        self._take_certain()

    def judge(self, scores: Seq[float], states: Tensor) -> int | None:
        """Hear the head on N candidates just fed; returns the branch to keep, if decided.

        Args:
            scores: Of the head at strength 1, see `HeadStacks.score`.
            states: Of the candidates, (N, d).
        """
        position, head = self.position, self.request.head
        assert position is not None and head is not None
        form, strength = head.config.form, self.request.gate.strength
        for score, state in zip(scores, states, strict=True):
            hazard_logit = position.hazard_logits[len(position.states)]
            position.accept_logits.append(accept_logit(form, score, hazard_logit, strength))
            position.states.append(state)
        count = len(position.token_ids)
        verdict = decide(position.accept_logits, count, self.rule, self.request.gate.fallback, position.uniform)
        if verdict is None:
            return None
        self._settle(position, verdict)
        return verdict.taken

    def _take_certain(self) -> None:
        """Take what the constraint leaves no choice in, to be fed in one forward with the token before."""
        constraint = self.request.constraint
        for token_id in constraint.certain() if constraint and self.finish_reason is None else ():
            self._take(Position([token_id], [0.0], [0.0], self._random.random()), 0, "single")
            self.pending.append(token_id)
            if self.finish_reason is not None:
                return

    def _settle(self, position: Position, verdict: Verdict) -> None:
        taken, visited = verdict
        if self.rule == "first":
            outcome: Outcome = "accepted" if position.accept_logits[taken] > 0 else "fallback"
        else:
            outcome = "forced" if taken == len(position.token_ids) - 1 else "accepted"
        self.stats.rejected += visited - (outcome != "fallback")
        if self.request.keep_positions:
            assert self.tip is not None
            shown = (position.token_ids, position.hazard_logits, torch.stack(position.states))
            self.positions.append(JudgedPosition(len(self.token_ids), *shown, self.tip))
        self.tip, self.position = position.states[taken], None
        del position.accept_logits[visited:]  # fed ahead, never asked
        self._take(position, taken, outcome)

    def _take(self, position: Position, taken: int, outcome: Outcome) -> None:
        token_id = position.token_ids[taken]
        self.token_ids.append(token_id)
        self._drafts.extend((token_id,))
        self.log_probs.append(position.log_probs[taken])
        if self.request.constraint is not None:
            self.request.constraint.accept(token_id)
        match outcome:
            case "accepted":
                self.stats.accepted += 1
            case "single":
                self.stats.single += 1
            case "forced":
                self.stats.forced += 1
            case "fallback":
                self.stats.fallbacks += 1
        if self.request.gate.trace:
            seen = (tuple(position.token_ids), tuple(position.log_probs), tuple(position.accept_logits))
            self.trace.append(TracePosition(*seen, taken, outcome))
        text = self.request.text
        if text is not None and token_id not in self.request.eos_token_ids:
            text.push(token_id)
        if token_id in self.request.eos_token_ids or (text is not None and text.stopped):
            is_cut_short = self.request.constraint is not None and self.request.constraint.is_cut_short
            self.finish_reason = "length" if is_cut_short else "stop"
        elif len(self.token_ids) >= self.request.sampling.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and text is not None:
            text.finish()
            if text.stopped:  # a stop string that only the last held-back characters completed
                self.finish_reason = "stop"

    def result(self) -> Generation:
        """The reply, once `finish_reason` is known."""
        assert self.finish_reason is not None
        return Generation(
            text=self.request.text.text if self.request.text else "",
            token_ids=tuple(self.token_ids),
            log_probs=tuple(self.log_probs),
            prompt_tokens=len(self.request.prompt_ids),
            finish_reason=self.finish_reason,
            stats=self.stats,
            trace=tuple(self.trace) if self.request.gate.trace else None,
        )
