"""Speculation: feed tokens ahead on a guess, and keep those that turn out to be the ones taken.

A drafted token is kept only if it is the token that the sequence takes anyway, by the same candidates, head and gate;
so drafting changes the number of forwards, never a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol
from weakref import WeakKeyDictionary

from typing_extensions import override

from mara_integrations.engine.batch import BatchEntry
from mara_integrations.engine.sequence import Sequence
from mara_integrations.engine.speculation.ngrams import NgramTable


class Speculation(Protocol):
    """A source of drafted tokens."""

    def draft(self, sequence: Sequence, max_tokens: Callable[[float], int]) -> list[int]:
        """Guess the tokens that follow those a sequence feeds next.

        Args:
            sequence: A sequence that is past its prompt; it feeds its pending tokens, or its first candidate.
            max_tokens: The most tokens worth drafting, given the probability that one of them is right.
        """

    def observe(self, sequence: Sequence, num_kept: int, num_drafted: int) -> None:
        """Learn how many tokens of a sequence's last draft were kept."""


class NgramSpeculation(Speculation):
    """Drafts copied from earlier text: of each sequence, its own prompt and reply."""

    def __init__(self) -> None:
        self._tables: WeakKeyDictionary[Sequence, NgramTable] = WeakKeyDictionary()

    @override
    def draft(self, sequence: Sequence, max_tokens: Callable[[float], int]) -> list[int]:
        table = self._tables.get(sequence)
        if table is None:
            table = self._tables[sequence] = NgramTable(sequence.request.prompt_ids)
        table.extend(sequence.token_ids[len(table) - len(sequence.request.prompt_ids) :])
        first_candidate = () if sequence.position is None else sequence.position.token_ids[:1]
        return table.propose(first_candidate, max_tokens)

    @override
    def observe(self, sequence: Sequence, num_kept: int, num_drafted: int) -> None:
        self._tables[sequence].observe(num_kept, num_drafted)


def num_draftable(sequence: Sequence) -> int:
    """Return how many tokens may be drafted behind those that a sequence feeds next."""
    if sequence.is_prefilling or sequence.has_ended:
        return 0
    if sequence.position is not None and sequence.position.states:  # its first candidate was rejected
        return 0
    return max(0, sequence.request.sampling.max_new_tokens - len(sequence.token_ids) - 1)


def verify(entry: BatchEntry, open_after: Callable[[BatchEntry, int], None]) -> int:
    """Commit drafted tokens as long as each is the token that its sequence takes next.

    Args:
        entry: A sequence that has opened its next position, and its draft.
        open_after: Opens the position after the first k drafted tokens, once these are committed.

    Returns:
        The number of tokens committed.
    """
    sequence, num_kept = entry.sequence, 0
    for token_id, score, state in zip(entry.draft, entry.draft_scores, entry.draft_states, strict=True):
        if sequence.has_ended or not sequence.commit_if_next(token_id, score, state):
            break
        num_kept += 1
        if sequence.is_settled:
            open_after(entry, num_kept)
    return num_kept
