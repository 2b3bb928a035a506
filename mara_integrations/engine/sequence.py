"""The live state of one request: what it feeds next, the candidates it looks at, the tokens it has taken."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mara_integrations.engine.backends.protocol import RowSize
from mara_integrations.engine.candidates import Ranking
from mara_integrations.engine.faults import naming
from mara_integrations.engine.gate import Rule, Verdict, accept_logit, decide, selection_rule
from mara_integrations.engine.generation import FinishReason, GateStats, Generation, Outcome, TracePosition
from mara_integrations.engine.request import Request
from mara_integrations.errors import MaraError
from mara_integrations.heads.compose import q_parts

# The row of a sequence for which none could be opened.
NO_ROW = -1
# Names of the parts that may fail, for messages.
_CONSTRAINT, _TEXT = "the grammar or logits processors of this request", "following the text of this reply"


@dataclass(slots=True)
class Position:
    """The candidates of the next token.

    Attributes:
        token_ids: Candidates, most probable first, K of them.
        log_probs: Log-probabilities of the candidates, see `Candidates`.
        hazard_logits: Hazard logits of the candidates, after Q-heads have scored them.
        uniform: The position's random number, in [0, 1).
        accept_logits: Accept logits of the candidates fed so far.
        states: Hidden states of the candidates fed so far, (d,) each.
        num_dropped: The first of these candidates, whose keys and values the backend has dropped again.
    """

    token_ids: list[int]
    log_probs: list[float]
    hazard_logits: list[float]
    uniform: float
    accept_logits: list[float] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    num_dropped: int = 0


@dataclass(slots=True)
class JudgedPosition:
    """A position as the head saw it, kept for training.

    Attributes:
        index: Place of the position in the reply, from 0.
        token_ids: Candidates, K of them.
        hazard_logits: Hazard logits of the candidates under the base model, K of them.
        states: Hidden states of the candidates that were fed, in order, (F, d); none under Q-heads.
        previous: Hidden state of the token before the position, (d,).
    """

    index: int
    token_ids: list[int]
    hazard_logits: list[float]
    states: Tensor
    previous: Tensor


class Sequence:
    """A request while it is decoded.

    It is in one of four states, and each forward moves it on:

        PENDING   Tokens are taken but not fed: the prompt, or a token that needed no judgement.
        SETTLED   All tokens are fed. The next position can be opened.
        OPEN      The candidates of a position are being fed and judged.
        ENDED     `finish_reason` is set, or `error`.

                  commit_pending()            open_position(): candidates have to be fed
        PENDING ------------------> SETTLED -----------------------------------------> OPEN
           ^                         |   ^                                             |  | judge(): undecided,
           +-------------------------+   +---------------------------------------------+--+ feed more candidates
             open_position(): base model,               judge(): a candidate is taken
             Q-heads, or one candidate

    Attributes:
        request: The request.
        row: The sequence's row in the backend.
        size: How large the row may grow.
        is_gated: Whether a head judges the candidates.
        q_head: The head, if Q-heads are part of it: they score candidates when a position opens.
        feeds_candidates: Whether candidates have to be fed to be judged: the head has other parts too.
        rule: How the gate turns accept logits into a token.
        pending: Tokens of prompt or reply that are not fed yet.
        position: The open position; None in the other states.
        last_state: Hidden state of the last committed token, (d,); None until the prompt is read.
        token_ids: Tokens of the reply.
        log_probs: Log-probabilities of these tokens, see `Generation`.
        states: Hidden states of the last prompt token and the reply's tokens, (d,) each, if the request keeps them.
        positions: The judged positions, if the request keeps them.
        trace: The trace, if the request asks for it.
        stats: Counts of what the gate did.
        finish_reason: Why the reply is finished; None while it goes on.
        error: Why the request has failed; None unless it has.
        is_cancelled: Nobody waits for the reply any more.
    """

    def __init__(self, request: Request, row: int, num_known: int = 0, size: RowSize | None = None) -> None:
        """Begin a request on a row that already holds the first `num_known` tokens of its prompt."""
        self.request = request
        self.size = size or RowSize(0, 0)
        self.row = row
        self.is_gated = request.head is not None and request.gate.strength > 0
        head = request.head if self.is_gated else None
        self.q_head = head if head is not None and q_parts(head) else None
        self.feeds_candidates = request.feeds_candidates
        form = head.config.form if head else None
        self.rule: Rule = selection_rule(request.gate.selection if form else "auto", form, self.temperature)
        self.pending: list[int] = list(request.prompt_ids[num_known:])
        self.position: Position | None = None
        self.last_state: Tensor | None = None
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.states: list[Tensor] = []
        self.positions: list[JudgedPosition] = []
        self.trace: list[TracePosition] = []
        self.stats = GateStats()
        self.finish_reason: FinishReason | None = None
        self.error: MaraError | None = None
        self.is_cancelled = False
        self._num_refed = 0  # pending tokens whose hidden states are known
        self._random = random.Random(request.sampling.seed)
        self._random_again = random.Random(None if request.sampling.seed is None else f"{request.sampling.seed} again")
        self._uniform: float | None = None  # of the next position, where it is drawn already

    @property
    def temperature(self) -> float:
        """The candidates' temperature; 0 for a head of the paper's form, as published."""
        head = self.request.head
        return 0.0 if self.is_gated and head and head.config.form == "paper" else self.request.sampling.temperature

    @property
    def is_prefilling(self) -> bool:
        """Its prompt is not all fed yet."""
        return bool(self.pending) and not self.token_ids

    @property
    def is_settled(self) -> bool:
        """All tokens are fed, and the reply goes on: the next position can be opened."""
        return self.position is None and not self.pending and not self.has_ended

    @property
    def has_ended(self) -> bool:
        """No more tokens will be taken."""
        return self.finish_reason is not None or self.error is not None

    @property
    def needs_forward(self) -> bool:
        """Something still has to be fed; a finished reply feeds its last token only for its hidden state."""
        if self.is_cancelled or self.error is not None:
            return False
        return self.finish_reason is None or (self.request.keep_states and bool(self.pending))

    @property
    def num_candidates_left(self) -> int:
        """Candidates of the open position that are not fed yet; 1 where the next token is already taken."""
        return 1 if self.position is None else len(self.position.token_ids) - len(self.position.states)

    def commit_pending(self, states: Tensor) -> None:
        """Count pending tokens as fed, given their hidden states (n, d)."""
        is_prompt = not self.token_ids
        del self.pending[: len(states)]
        self.last_state = states[-1]
        if is_prompt:  # of a prompt, only the last token's state is kept
            states = states[-1:] if not self.pending else states[:0]
        self._keep_states(states[self._num_refed :])
        self._num_refed = 0

    def feed_again(self) -> None:
        """Make the last token pending again: its keys and values were dropped before it was taken."""
        self.pending = self.token_ids[-1:]
        self._num_refed = 1

    def open_position(self, ranking: Ranking) -> None:
        """Open the next position; where there is nothing to judge, take its token at once."""
        token_ids, log_probs, _, accept_logits = ranking
        uniform, self._uniform = self._random.random() if self._uniform is None else self._uniform, None
        position = Position(token_ids, log_probs, accept_logits, uniform)
        if len(token_ids) == 1:
            self._take(position, 0, "single")
        elif self.feeds_candidates:
            self.position = position
            return
        else:
            fallback = self.request.gate.fallback if self.is_gated else "first"
            verdict = decide(accept_logits, len(token_ids), self.rule, fallback, position.uniform)
            assert verdict is not None, "all candidates are known"
            if self.is_gated:
                self._take_scored(ranking, position, verdict)
            else:
                self._take(position, verdict.taken, "base")
        self.pending = self.token_ids[-1:]
        self._take_certain()

    def judge(self, scores: Seq[float], states: Tensor) -> Verdict | None:
        """Judge candidates that were just fed; returns the gate's decision, or None if it needs more candidates.

        Args:
            scores: The head's scores of the candidates at strength 1, see `HeadStacks.score`, N of them.
            states: Hidden states of the candidates, (N, d).
        """
        position, head = self.position, self.request.head
        assert position is not None and head is not None, "there is an open position to judge"
        form, strength = head.config.form, self.request.gate.strength
        for score, state in zip(scores, states, strict=True):
            hazard_logit = position.hazard_logits[len(position.states)]
            position.accept_logits.append(accept_logit(form, score, hazard_logit, strength))
            position.states.append(state)
        num_candidates = len(position.token_ids)
        verdict = decide(
            position.accept_logits, num_candidates, self.rule, self.request.gate.fallback, position.uniform
        )
        if verdict is not None:
            self._take_judged(position, verdict)
        return verdict

    def commit_if_next(self, token_id: int, score: float | None, state: Tensor) -> bool:
        """Commit a token that was fed ahead, if it is the token that comes next; returns whether it is.

        Args:
            token_id: The token.
            score: The head's score of it; None without a gate.
            state: The hidden state after it, (d,).
        """
        if self.position is None:
            if token_id != self.pending[0]:
                return False
            self.commit_pending(state[None])
            return True
        if token_id != self.position.token_ids[0]:
            return False
        assert score is not None, "a gated sequence has its drafts scored"
        return self.judge([score], state[None]) is not None

    def fail(self, error: MaraError) -> None:
        """End the request with an error; the first one counts."""
        self.error = self.error or error

    def result(self) -> Generation:
        """Return the finished reply; its text is the raw text, which is read where the reply is delivered."""
        assert self.finish_reason is not None, "the reply goes on"
        raw_text = self.request.text.text if self.request.text else ""
        return Generation(
            text=raw_text,
            raw_text=raw_text,
            token_ids=tuple(self.token_ids),
            log_probs=tuple(self.log_probs),
            prompt_tokens=len(self.request.prompt_ids),
            finish_reason=self.finish_reason,
            stats=self.stats,
            trace=tuple(self.trace) if self.request.gate.trace else None,
        )

    def mask(self, logits: Tensor) -> None:
        """Let the request's constraint, if it has one, forbid tokens of the next position, in place, (V,)."""
        if self.request.constraint is not None:
            with naming(_CONSTRAINT):
                self.request.constraint.mask(logits)

    def refuses(self, ranking: Ranking) -> bool:
        """Return whether the request's constraint refuses what would be taken of the next position's candidates.

        If so, the position is ranked again after `mask_refused`, and decided with another random number: the law is
        then the one without the refused tokens, and a reply to which nothing is refused stays as it is. Where
        candidates have to be fed to be judged, what would be taken is not known, and any of them is looked at.
        """
        constraint, count = self.request.constraint, len(ranking.token_ids)
        if constraint is None or not count:
            return False
        if self._uniform is None:
            self._uniform = self._random.random()
        likely = ranking.token_ids
        if not self.feeds_candidates and count > 1:
            fallback = self.request.gate.fallback if self.is_gated else "first"
            verdict = decide(ranking.accept_logits, count, self.rule, fallback, self._uniform)
            assert verdict is not None, "all candidates are known"
            likely = [ranking.token_ids[verdict.taken]]
        with naming(_CONSTRAINT):
            return any(map(constraint.refuses, likely))

    def mask_refused(self, logits: Tensor) -> None:
        """Forbid all tokens that the request's constraint refuses at the next position, in place, (V,)."""
        assert self.request.constraint is not None, "it has refused a token"
        with naming(_CONSTRAINT):
            self.request.constraint.mask_refused(logits)
        self._uniform = self._random_again.random()

    def _take_scored(self, ranking: Ranking, position: Position, verdict: Verdict) -> None:
        """Take a candidate of a position whose candidates were all scored before any was fed."""
        position.accept_logits = ranking.accept_logits
        self.stats.rejected += verdict.taken if verdict.accepted else verdict.num_visited
        if self.request.keep_positions:
            assert self.last_state is not None, "the prompt was read"
            none_fed = self.last_state.new_empty(0, len(self.last_state))
            seen = (position.token_ids, ranking.hazard_logits, none_fed, self.last_state)
            self.positions.append(JudgedPosition(len(self.token_ids), *seen))
        self._take(position, verdict.taken, self._outcome(position, verdict))

    def _outcome(self, position: Position, verdict: Verdict) -> Outcome:
        if self.rule != "first" and verdict.taken == len(position.token_ids) - 1:
            return "forced"
        return "accepted" if verdict.accepted else "fallback"

    def _take_judged(self, position: Position, verdict: Verdict) -> None:
        """Close the open position with the candidate that the gate took."""
        taken, num_visited, accepted = verdict
        self.stats.rejected += num_visited - accepted
        if self.request.keep_positions:
            assert self.last_state is not None, "the prompt was read"
            seen = (position.token_ids, position.hazard_logits, torch.stack(position.states))
            self.positions.append(JudgedPosition(len(self.token_ids), *seen, self.last_state))
        self.last_state, self.position = position.states[taken], None
        self._keep_states(position.states[taken][None])
        del position.accept_logits[num_visited:]  # of candidates that were fed but not needed
        self._take(position, taken, self._outcome(position, verdict))

    def _take_certain(self) -> None:
        """Take the tokens that the constraint leaves no choice in; they are fed together with the one before."""
        constraint = self.request.constraint
        if constraint is None or self.finish_reason is not None:
            return
        with naming(_CONSTRAINT):
            certain = list(constraint.certain())
        for token_id in certain:
            self._take(Position([token_id], [0.0], [0.0], self._random.random()), 0, "single")
            self.pending.append(token_id)
            if self.finish_reason is not None:
                return

    def _take(self, position: Position, taken: int, outcome: Outcome) -> None:
        """Append a candidate to the reply."""
        token_id = position.token_ids[taken]
        self.token_ids.append(token_id)
        self.log_probs.append(position.log_probs[taken])
        self._count(outcome)
        if self.request.gate.trace:
            seen = (tuple(position.token_ids), tuple(position.log_probs), tuple(position.accept_logits))
            self.trace.append(TracePosition(*seen, taken, outcome))
        if self.request.constraint is not None:
            with naming(_CONSTRAINT):
                self.request.constraint.accept(token_id)
        with naming(_TEXT):
            self._follow_text(token_id)

    def _follow_text(self, token_id: int) -> None:
        """Pass the token on to the text, and end the reply if this token ends it."""
        text, is_eos = self.request.text, token_id in self.request.eos_token_ids
        if text is not None and not is_eos:
            text.push(token_id)
        if is_eos or (text is not None and text.stopped):
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.request.sampling.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            self._finish(self.finish_reason)

    def _finish(self, reason: FinishReason) -> None:
        """End the reply, with the characters that were held back."""
        self.finish_reason, text = reason, self.request.text
        if text is not None:
            text.finish()
            if text.stopped:  # a stop string that only the last held-back characters completed
                self.finish_reason = "stop"

    def _count(self, outcome: Outcome) -> None:
        match outcome:
            case "accepted":
                self.stats.accepted += 1
            case "single":
                self.stats.single += 1
            case "forced":
                self.stats.forced += 1
            case "fallback":
                self.stats.fallbacks += 1

    def _keep_states(self, states: Tensor) -> None:
        """Keep hidden states of committed tokens, (n, d), if the request asks for them."""
        if self.request.keep_states:
            self.states += states.clone()
