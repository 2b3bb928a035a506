"""Rank the candidates of many positions at once, and score them by Q-heads, which need no forward of a candidate."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from mara_integrations.engine.backends.protocol import Backend
from mara_integrations.engine.candidates import Candidates, Ranking, rank_candidates
from mara_integrations.engine.faults import HEAD, naming
from mara_integrations.engine.gate import q_accept_logits
from mara_integrations.engine.head_stacks import HeadStacks, PositionInput
from mara_integrations.engine.sequence import Sequence
from mara_integrations.errors import HeadError


def rank(
    sequences: Seq[Sequence], hidden: Tensor, logits: Tensor, backend: Backend, heads: HeadStacks
) -> list[Ranking]:
    """Rank the candidates of one position of each sequence, and let the sequence's Q-heads score them.

    Args:
        sequences: B sequences; one that has drafted tokens is there several times.
        hidden: Hidden state before each position, (B, d).
        logits: Logits made of these and masked by constraints, (B, V).
        backend: Gives the output embeddings.
        heads: Evaluates the heads.

    Returns:
        B rankings; empty where there is no candidate. Where a head's scores are not finite, accept logits are neither.

    Raises:
        HeadError: If a head can't be evaluated.
    """
    sampling = [sequence.request.sampling for sequence in sequences]
    candidates = rank_candidates(
        logits,
        top_k=[s.top_k for s in sampling],
        top_p=[s.top_p for s in sampling],
        temperature=[sequence.temperature or 1.0 for sequence in sequences],
        min_candidates=[s.min_candidates for s in sampling],
    )
    return _weighed(sequences, hidden, candidates, backend, heads, logits.shape[-1]).rankings()


def _weighed(
    sequences: Seq[Sequence],
    hidden: Tensor,
    candidates: Candidates,
    backend: Backend,
    heads: HeadStacks,
    vocab_size: int,
) -> Candidates:
    """Return the candidates with the accept logits of their Q-heads."""
    counts = candidates.counts.tolist()
    heads_of = {row: sequence.q_head for row, sequence in enumerate(sequences) if counts[row] > 1}
    gated = {row: head for row, head in heads_of.items() if head is not None}
    if not gated:
        return candidates
    inputs = [PositionInput(head, hidden[row], counts[row]) for row, head in gated.items()]
    rows = slice(None) if len(gated) == len(sequences) else list(gated)  # a slice copies nothing
    live = candidates.live[rows]  # (R, K)
    token_ids = candidates.token_ids[rows][live].to(hidden.device)  # (N,)
    with naming(HEAD, HeadError):
        scores = heads.score_positions(inputs, token_ids, backend.output_embeddings, vocab_size).cpu()
    # explicit dtypes: loading a model in another thread changes torch's default for a while
    strengths = torch.tensor([[sequences[row].request.gate.strength] for row in gated], dtype=torch.float32)
    q_scores = scores.new_zeros(live.shape).masked_scatter_(live, scores)
    accept_logits = candidates.accept_logits.clone()
    accept_logits[rows] = q_accept_logits(candidates.hazard_logits[rows], q_scores, strengths, live)
    return replace(candidates, accept_logits=accept_logits)
