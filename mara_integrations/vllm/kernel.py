"""The gate of Q-heads over a batch of logits: pure, of fixed shapes, with no wait for the device.

Which rows are gated, by which heads and how is known on the host and laid out by `tables`; here are tensors alone. Both
of vLLM's model runners call it. Knows nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mara_integrations.engine.candidates import SPARE_COLUMNS, keep_top_k, keep_top_p
from mara_integrations.engine.gate import weighted_log_probs
from mara_integrations.engine.head_stacks import stacked_state_features

_BLOCK = 64  # logits


class RowSettings(NamedTuple):
    """Settings of R gated rows, shape (R, 1) each.

    Attributes:
        num_kept: Number of most probable tokens that are candidates, top_k.
        removed_mass: Share of their probability that top-p leaves out, 1 - top_p.
        floor: Candidates kept whatever top-p says.
        temperature: Temperature that the logits will be divided by; 1 where decoding is greedy.
        strength: Dial on the heads.
    """

    num_kept: Tensor
    removed_mass: Tensor
    floor: Tensor
    temperature: Tensor
    strength: Tensor


class Block(NamedTuple):
    """Neighbouring heads of a stack that are evaluated together, for E' of the E evaluations.

    Attributes:
        heads: Slots of the heads.
        evaluations: The evaluations, which are neighbours too.
        width: The most evaluations of any of the heads, W.
        places: Place of each evaluation among S' * W, shape (E',); None for a single head, which has no padding.
    """

    heads: slice
    evaluations: slice
    width: int
    places: Tensor | None


class Share(NamedTuple):
    """What heads of one shape add to the scores: E evaluations, each of one head for one row.

    Attributes:
        weights: Weights of S stacked heads by name, (S, ...) each.
        table: Candidate features of every token under each head, shape (S, V, r).
        first_token: The token of the table's first row; above 0 where ranks share the vocabulary.
        rows: Gated row of each evaluation, shape (E,).
        slots: Head of each evaluation, shape (E,).
        factors: Weight of each evaluation, shape (E, 1).
        blocks: What is evaluated together; all evaluations in order.
    """

    weights: Mapping[str, Tensor]
    table: Tensor
    first_token: int
    rows: Tensor
    slots: Tensor
    factors: Tensor
    blocks: Sequence[Block]


class Layout(NamedTuple):
    """What holds for a batch until requests come or go.

    Attributes:
        rows: Rows of the logits that are gated, shape (R,); None where all are.
        settings: Their settings.
        shares: Their heads, shape by shape.
        max_kept: The largest `num_kept`.
    """

    rows: Tensor | None
    settings: RowSettings
    shares: Sequence[Share]
    max_kept: int


def gate_logits(
    logits: Tensor, hidden: Tensor, layout: Layout, reduce: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Gate rows of logits, in place: candidates get the gate's logits, and all other tokens -inf.

    Divided by the row's temperature, the softmax of a row is the gate's distribution over its candidates. Their
    probability as a whole stays what it was, so that penalties that come later find logits of the usual size.

    Args:
        logits: Logits before the temperature, with whatever masks apply, float32, shape (B, V).
        hidden: Hidden states that the logits were made of, after the final norm, shape (B, d).
        layout: Which rows are gated, and how.
        reduce: Sums scores over ranks that hold a part of the vocabulary each.

    Returns:
        `logits`. At most `SPARE_COLUMNS` tokens tied with the last that top-k keeps are candidates too.
    """
    if layout.rows is None:
        return _gate(logits, hidden, layout, reduce)
    gated = _gate(logits[layout.rows], hidden[layout.rows], layout, reduce)
    return logits.index_copy_(0, layout.rows, gated)


def _gate(logits: Tensor, hidden: Tensor, layout: Layout, reduce: Callable[[Tensor], Tensor] | None) -> Tensor:
    """`gate_logits` where every row is gated: (R, V) and (R, d) to (R, V)."""
    settings = layout.settings
    values, token_ids = _highest(logits, min(layout.max_kept + SPARE_COLUMNS, logits.shape[1]))  # (R, K)
    values = keep_top_k(values / settings.temperature, settings.num_kept)
    live, _ = keep_top_p(values, settings.removed_mass, settings.floor)
    values = values.masked_fill(~live, -torch.inf)
    scores = torch.zeros_like(values)
    for share in layout.shares:
        _add_scores(scores, share, hidden, token_ids)
    if reduce is not None:
        scores = reduce(scores)
    gated = weighted_log_probs(values.log_softmax(-1), scores, settings.strength, live)
    gated = (gated + values.logsumexp(-1, keepdim=True)) * settings.temperature
    gated = gated.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)  # a row without a candidate
    return logits.fill_(-torch.inf).scatter_(1, token_ids, gated)


def _highest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the highest logits of each row, highest first, and their tokens: (R, V) to (R, count) each.

    They lie in the blocks of the highest maxima; to look there alone takes two thirds of the time of `topk` on a CPU.
    """
    num_rows, vocab_size = logits.shape
    num_blocks = vocab_size // _BLOCK
    if vocab_size % _BLOCK or num_blocks <= count:
        values, token_ids = logits.topk(count)
        return values, token_ids
    blocks = logits.view(num_rows, num_blocks, _BLOCK).amax(-1).topk(count, sorted=False).indices
    token_ids = (blocks[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)).flatten(1)
    values, places = logits.gather(1, token_ids).topk(count)
    return values, token_ids.gather(1, places)


def _add_scores(scores: Tensor, share: Share, hidden: Tensor, token_ids: Tensor) -> None:
    """Add what the heads of one shape say of candidates: scores and token ids (R, K), states (R, d)."""
    states = hidden[share.rows].to(share.weights["ln.weight"].dtype)  # (E, d)
    features = torch.cat([_state_features(share.weights, states, block) for block in share.blocks])  # (E, r)
    num_tokens = share.table.shape[1]
    places = token_ids[share.rows] - share.first_token  # (E, K)
    is_here = (places >= 0) & (places < num_tokens)
    places = places.clamp(0, num_tokens - 1) + share.slots[:, None] * num_tokens
    candidates = share.table.flatten(0, 1)[places]  # (E, K, r)
    found = torch.bmm(candidates.to(features.dtype), features[:, :, None]).squeeze(-1).float()
    scores.index_add_(0, share.rows, found * is_here * share.factors)


def _state_features(weights: Mapping[str, Tensor], states: Tensor, block: Block) -> Tensor:
    """`QHead.state_features` of a block's evaluations, (E', r), of the states of all, (E, d)."""
    own, weights = states[block.evaluations], {name: weight[block.heads] for name, weight in weights.items()}
    if block.places is None:
        return stacked_state_features(weights, own[None])[0]
    num_heads = len(weights["ln.weight"])
    padded = own.new_zeros(num_heads * block.width, own.shape[1]).index_copy_(0, block.places, own)
    return stacked_state_features(weights, padded.view(num_heads, block.width, -1)).flatten(0, 1)[block.places]
