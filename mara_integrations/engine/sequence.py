"""The live state of one request: what it feeds next, what the gate decided, why it ended."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mara_integrations.engine.backends.protocol import Segment
from mara_integrations.engine.candidates import Ranking
from mara_integrations.engine.gate import Rule, Verdict, accept_logit, decide, selection_rule
from mara_integrations.engine.generation import FinishReason, GateStats, Generation, Outcome, TracePosition
from mara_integrations.engine.head_stacks import Shown
from mara_integrations.engine.request import Request
from mara_integrations.engine.speculation.ngrams import NgramDraft


@dataclass(slots=True)
class Position:
    """The candidates of the next token, and what is known of them so far."""

    token_ids: list[int]
    log_probs: list[float]
    hazard_logits: list[float]
    uniform: float
    accept_logits: list[float] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)  # of the candidates fed, each (d,)


class FedAhead(NamedTuple):
    """A drafted token, and what was computed of it before the tokens in front of it were settled.

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
    it is what is taken in its place. In a step it is asked in turn to `propose`, to `receive` what the model made of
    that, to `hear` its head on it, and to `follow` what was fed ahead.

    Attributes:
        tip: Hidden state of the last committed token, (d,); None until the prompt was read.
        num_wasted: Tokens at the end of its row that have to be taken back; see `Backend.retract`.
    """

    def __init__(self, request: Request, row: int, num_known: int = 0) -> None:
        self.request = request
        self.row = row
        self.gated = request.head is not None and request.gate.strength > 0
        form = request.head.config.form if request.head and self.gated else None
        self.rule: Rule = selection_rule(request.gate.selection if form else "auto", form, self.temperature)
        self.pending: list[int] = list(request.prompt_ids[num_known:])  # the row was opened with the others
        self.position: Position | None = None
        self.tip: Tensor | None = None
        self.num_wasted = 0
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.states: list[Tensor] = []
        self.positions: list[JudgedPosition] = []
        self.trace: list[TracePosition] = []
        self.stats = GateStats()
        self.finish_reason: FinishReason | None = None
        self.cancelled = False
        self._draft: list[int] = []  # at the end of what was proposed last
        self._undecided: Tensor | None = None  # states of what was proposed last and is not settled, (n, d)
        self._ahead: list[FedAhead] = []
        self._drafts = NgramDraft(request.prompt_ids)
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
    def is_settled(self) -> bool:
        """All that was taken is committed: the next position can be opened."""
        return self.position is None and not self.pending and self.finish_reason is None

    @property
    def num_left(self) -> int:
        """Candidates not fed yet; 1 where the next token is settled."""
        return 1 if self.position is None else len(self.position.token_ids) - len(self.position.states)

    @property
    def has_drafted(self) -> bool:
        """It proposed a chain last that ends in drafted tokens."""
        return bool(self._draft)

    @property
    def holds_branch(self) -> bool:
        """The first candidate of its position was fed and not taken so far."""
        return self.position is not None and bool(self.position.states)

    @property
    def is_waiting(self) -> bool:
        """Something still has to be fed for it."""
        if self.cancelled:
            return False
        return self.finish_reason is None or (self.request.keep_states and bool(self.pending))

    def propose(self, width: int, chunk: int, num_drafted: Callable[[float], int] | None = None) -> Segment:
        """What to feed next: up to `chunk` pending tokens, or up to `width` more candidates.

        Where the text seems to repeat itself, one token that is taken or likely to be, and drafted ones behind it, as
        one chain.

        Args:
            width: At least 1.
            chunk: At least 1.
            num_drafted: How many tokens to draft at most, given the probability that one of them is right.
        """
        self._draft = self._drafted(num_drafted) if num_drafted is not None else []
        if self.position is None:
            return Segment(self.row, [*self.pending[:chunk], *self._draft])
        fed = len(self.position.states)
        if self._draft:
            return Segment(self.row, [self.position.token_ids[0], *self._draft])
        return Segment(self.row, self.position.token_ids[fed : fed + width], siblings=True)

    def _drafted(self, num_drafted: Callable[[float], int]) -> list[int]:
        room = self.request.sampling.max_new_tokens - len(self.token_ids) - 1
        if room < 1 or self.is_prefilling:
            return []
        if self.position is None:
            return self._drafts.propose((), num_drafted)[:room]
        if self.position.states:
            return []
        return self._drafts.propose(self.position.token_ids[:1], num_drafted)[:room]

    def receive(self, states: Tensor) -> Shown | None:
        """Take the states of what was proposed, (n, d); returns what its head has to look at.

        Tokens that were settled are committed by being fed.
        """
        if self.token_ids or self.position is not None:
            self.stats.fed += len(states)
        previous = self.tip
        if self.position is None:
            num_settled = len(states) - len(self._draft)
            del self.pending[:num_settled]
            if self.token_ids:
                self._keep(states[:num_settled])
            elif not self.pending:  # of the prompt, the last token's
                self._keep(states[num_settled - 1 : num_settled])
            previous = self.tip = states[num_settled - 1]
            states = states[num_settled:]
        self._undecided = states
        if not self.gated or not len(states):
            return None
        assert self.request.head is not None and previous is not None, "its prompt was fed before"
        if self._draft:  # a chain
            previous = torch.cat([previous[None], states[:-1]])
        return Shown(self.request.head, states, previous)

    def hear(self, scores: Seq[float] = ()) -> Verdict | None:
        """Hear its head on what it was shown; returns how the position that was open is decided, if it is.

        Args:
            scores: Of the head at strength 1, see `HeadStacks.score`; none where it was shown nothing.
        """
        states, self._undecided = self._undecided, None
        assert states is not None, "receive comes first"
        verdict = None
        if self.position is not None:
            num_asked = len(states) - len(self._draft)
            verdict = self.judge(scores[:num_asked], states[:num_asked])
            if verdict is None:
                self.num_wasted = len(states) if self._draft else 0
                return None
            scores, states = scores[num_asked:], states[num_asked:]
        known = scores if self.gated else [None] * len(states)
        self._ahead = [FedAhead(*fed) for fed in zip(self._draft, known, states, strict=True)]
        return verdict

    def tips(self) -> list[Tensor]:
        """States whose next tokens it has to know: the last settled one, and those fed ahead of it, (d,) each."""
        assert self.tip is not None
        return [self.tip, *(fed.state for fed in self._ahead)]

    def follow(self, ranking: Callable[[int], Ranking]) -> None:
        """Open the next position, and settle it and those after it as far as their tokens were fed ahead.

        Args:
            ranking: The candidates after one of `tips`, asked for in order, once all tokens before them are taken.
        """
        ahead, self._ahead = self._ahead, []
        num_kept = 0
        while True:
            if self.is_settled:
                self.open_position(*ranking(num_kept))
            if num_kept == len(ahead) or self.finish_reason is not None or not self._is_what_comes(ahead[num_kept]):
                break
            num_kept += 1
        if ahead:
            self._drafts.observe(num_kept, len(ahead))
        self.num_wasted = len(ahead) - num_kept

    def _is_what_comes(self, fed: FedAhead) -> bool:
        """Commit a token that was fed ahead, if it is the one that is pending, or is taken in the open position."""
        if self.position is None:
            if fed.token_id != self.pending[0]:
                return False
            del self.pending[0]
            self.tip = fed.state
            self._keep(fed.state[None])
            return True
        if fed.token_id != self.position.token_ids[0]:
            return False
        assert fed.score is not None, "a gated sequence shows all it feeds to its head"
        return self.judge([fed.score], fed.state[None]) is not None

    def _keep(self, states: Tensor) -> None:
        """Keep states of committed tokens for training, (n, d), if the request asks for it."""
        if self.request.keep_states:
            self.states += states.clone()

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

    def judge(self, scores: Seq[float], states: Tensor) -> Verdict | None:
        """Hear the head on N candidates just fed; returns the decision, if there is one.

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
        if verdict is not None:
            self._settle(position, verdict)
        return verdict

    def _take_certain(self) -> None:
        """Take what the constraint leaves no choice in, to be fed in one forward with the token before."""
        constraint = self.request.constraint
        for token_id in constraint.certain() if constraint and self.finish_reason is None else ():
            self._take(Position([token_id], [0.0], [0.0], self._random.random()), 0, "single")
            self.pending.append(token_id)
            if self.finish_reason is not None:
                return

    def _settle(self, position: Position, verdict: Verdict) -> None:
        taken, visited, accepted = verdict
        is_forced = self.rule != "first" and taken == len(position.token_ids) - 1
        outcome: Outcome = "forced" if is_forced else "accepted" if accepted else "fallback"
        self.stats.rejected += visited - accepted
        if self.request.keep_positions:
            assert self.tip is not None
            shown = (position.token_ids, position.hazard_logits, torch.stack(position.states))
            self.positions.append(JudgedPosition(len(self.token_ids), *shown, self.tip))
        self.tip, self.position = position.states[taken], None
        self._keep(position.states[taken][None])
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
