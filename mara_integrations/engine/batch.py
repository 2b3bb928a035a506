"""What one forward feeds and what came out of it, sequence by sequence."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mara_integrations.engine.backends.protocol import Segment
from mara_integrations.engine.candidates import Ranking
from mara_integrations.engine.head_stacks import HeadInput
from mara_integrations.engine.sequence import Sequence


@dataclass(slots=True)
class BatchEntry:
    """One sequence's part of a forward: the tokens that are due, and drafted tokens fed ahead behind them.

    Attributes:
        sequence: Whose tokens they are.
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
        return Segment(self.sequence.row, [*self.due, *self.draft], siblings=not is_chain)

    def take_states(self, states: Tensor) -> None:
        """Take the hidden states of the segment, (n + m, d). Pending tokens are committed by being fed."""
        sequence, num_due = self.sequence, len(self.due)
        self.states, self.draft_states = states[:num_due], states[num_due:]
        self.draft_scores = [None] * len(self.draft)
        if not sequence.is_prefilling:
            sequence.stats.fed += len(states)
        if sequence.position is None:
            sequence.commit_pending(self.states)

    def head_input(self) -> HeadInput | None:
        """What the head has to score: candidates that are due, and drafted tokens; None where there is nothing."""
        sequence = self.sequence
        states = self.draft_states if sequence.position is None else torch.cat([self.states, self.draft_states])
        if not sequence.feeds_candidates or not len(states):
            return None
        assert sequence.request.head is not None and sequence.last_state is not None, "the prompt was read"
        previous = sequence.last_state
        if self.draft:  # a chain: each token follows the one before it
            previous = torch.cat([previous[None], states[:-1]])
        return HeadInput(sequence.request.head, states, previous)

    def take_scores(self, scores: list[float]) -> None:
        """Take the head's scores of what `head_input` returned."""
        num_candidates = len(scores) - len(self.draft)
        self.scores, self.draft_scores = scores[:num_candidates], scores[num_candidates:]
