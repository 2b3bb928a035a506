"""The input and output of one forward, sequence by sequence. A failure ends only the sequence that it is in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from mara_integrations.engine.backends.protocol import Segment
from mara_integrations.engine.candidates import Ranking
from mara_integrations.engine.faults import described, nonfinite, nonfinite_scores
from mara_integrations.engine.head_stacks import HeadInput
from mara_integrations.engine.sequence import Sequence
from mara_integrations.errors import MaraError, ModelError

Result = TypeVar("Result")


@dataclass(slots=True)
class BatchEntry:
    """One sequence's part of a forward: the tokens that are due, and drafted tokens fed ahead behind them.

    Attributes:
        sequence: The sequence that feeds these tokens.
        due: Pending tokens, or candidates of the open position; n of them.
        draft: Drafted tokens, m of them, usually none.
        states: Hidden states of the tokens that are due, (n, d).
        draft_states: Hidden states of the drafted tokens, (m, d).
        scores: The head's scores of the candidates that are due; empty where pending tokens are.
        draft_scores: The head's scores of the drafted tokens, m of them; None where it has no afterstate part.
        rankings: Candidates of the next position, then of the positions after the drafted tokens; 1 + m of them.
        logits: Logits that the rankings were made from, (1 + m, V).
    """

    sequence: Sequence
    due: list[int]
    draft: list[int]
    states: Tensor = field(init=False)
    draft_states: Tensor = field(init=False)
    scores: list[float] = field(default_factory=list)
    draft_scores: Seq[float | None] = ()
    rankings: list[Ranking] = field(default_factory=list)
    logits: Tensor = field(init=False)

    @property
    def segment(self) -> Segment:
        """The tokens to feed: candidates as siblings; pending and drafted tokens as one chain."""
        is_chain = self.sequence.position is None or bool(self.draft)
        only_last = self.sequence.is_prefilling and not self.draft
        return Segment(self.sequence.row, [*self.due, *self.draft], siblings=not is_chain, only_last=only_last)

    def take_states(self, states: Tensor) -> None:
        """Take the hidden states of the segment, (n + m, d). Pending tokens are committed by being fed."""
        sequence, num_due = self.sequence, len(self.due)
        self.states, self.draft_states = states[:num_due], states[num_due:]
        self.draft_scores = [None] * len(self.draft)
        if not sequence.is_prefilling:
            sequence.stats.fed += len(states)
        if sequence.position is None:
            sequence.commit_pending(self.states)

    @property
    def needs_head(self) -> bool:
        """Whether the head has something to score: candidates that are due, or drafted tokens."""
        return self.sequence.feeds_candidates and (self.sequence.position is not None or bool(self.draft))

    def head_input(self) -> HeadInput:
        """Return what the head has to score, if `needs_head`."""
        sequence = self.sequence
        assert sequence.request.head is not None and sequence.last_state is not None, "the prompt was read"
        states = self.draft_states if sequence.position is None else torch.cat([self.states, self.draft_states])
        previous = sequence.last_state
        if self.draft:  # a chain: each token follows the one before it
            previous = torch.cat([previous[None], states[:-1]])
        return HeadInput(sequence.request.head, states, previous)

    def take_scores(self, scores: list[float]) -> None:
        """Take the head's scores of what `head_input` returned.

        Raises:
            ModelError: If they are not finite because the model's hidden states are not.
            HeadError: If only the scores are not finite.
        """
        if not all(map(math.isfinite, scores)):
            if not (self.states.isfinite().all() and self.draft_states.isfinite().all()):
                raise nonfinite("hidden states")
            raise nonfinite_scores()
        num_candidates = len(scores) - len(self.draft)
        self.scores, self.draft_scores = scores[:num_candidates], scores[num_candidates:]

    @property
    def ranked_states(self) -> Tensor:
        """Hidden states before the next position of a settled sequence and after its drafted tokens, (1 + m, d)."""
        assert self.sequence.last_state is not None, "a settled sequence has fed something"
        return torch.cat([self.sequence.last_state[None], self.draft_states])

    def open_position(self, ranking: Ranking, logits: Tensor) -> None:
        """Open the sequence's next position, given its candidates and the logits (V,) they are from.

        Raises:
            ModelError: If there is no candidate.
            HeadError: If a Q-head's scores are not finite.
        """
        if not all(map(math.isfinite, ranking.accept_logits)):
            raise nonfinite_scores()
        if ranking.token_ids:
            self.sequence.open_position(ranking)
        elif self.sequence.request.constraint is not None and bool(logits.isneginf().all()):
            raise ModelError(
                "no token may come next: the grammar, forbidden words or logits processors of this request forbid "
                "them all"
            )
        else:
            raise nonfinite("logits")


@contextmanager
def ends_alone(sequence: Sequence) -> Iterator[None]:
    """Let a failure in the block end this sequence, and no other."""
    try:
        yield
    except Exception as error:
        sequence.fail(described(error, "decoding this request"))


def run_isolated(
    entries: Seq[BatchEntry],
    run: Callable[[Seq[BatchEntry]], Seq[Result]],
    what: str,
    kind: type[MaraError] = ModelError,
) -> list[tuple[BatchEntry, Result]]:
    """Run a step for a batch; if it fails, run it entry by entry, and end the sequences that fail alone.

    Args:
        entries: The batch.
        run: The step. It returns a result for each entry, and changes nothing if it fails.
        what: The part that failed, for the message.
        kind: The class of the error.

    Returns:
        The entries that did not fail, with their results.
    """
    if not entries:
        return []
    try:
        return list(zip(entries, run(entries), strict=True))
    except Exception as error:
        if len(entries) == 1:
            entries[0].sequence.fail(described(error, what, kind))
            return []
    results: list[tuple[BatchEntry, Result]] = []
    for entry in entries:  # outside of the handler: what the failed attempt held is free again
        results += run_isolated([entry], run, what, kind)
    return results
