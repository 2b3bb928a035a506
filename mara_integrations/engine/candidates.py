"""From logits to ranked candidates: temperature, then top-k, then top-p, exactly as transformers filters them.

Knows one position of each of B sequences; does not know heads, gates or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Where a float sum lands this close to the top-p boundary, the row is decided again on transformers' own sum.
_BOUNDARY_GUARD = 1e-5
# A hazard of 1 - 1e-13: further out the accept logit would drown any head, and the last candidate's is infinite.
MAX_HAZARD_LOGIT = 30.0


@dataclass(frozen=True, slots=True)
class Candidates:
    """Ranked candidates of B positions, padded to K columns.

    Attributes:
        token_ids: Most probable first, ties by token id, shape (B, K).
        log_probs: Of the whole vocabulary at temperature 1, in nats, shape (B, K).
        hazard_logits: Logit of the base model's hazard, its probability of this candidate given that all before it were
            passed over, from the filtered and renormalised distribution; clamped to +-30, shape (B, K).
        counts: Live candidates of each row, at least 1, shape (B,).
    """

    token_ids: Tensor
    log_probs: Tensor
    hazard_logits: Tensor
    counts: Tensor


def rank_candidates(
    logits: Tensor,
    *,
    top_k: Sequence[int],
    top_p: Sequence[float],
    temperature: Sequence[float],
    min_candidates: Sequence[int],
) -> Candidates:
    """Rank the candidates of each row.

    Args:
        logits: Shape (B, V), any float type.
        top_k: Kept by value for each row, length B; candidates tied with the last one stay, as in transformers.
        top_p: Kept by renormalised probability for each row, length B.
        temperature: Divides the logits before the filters, above 0, length B.
        min_candidates: Survivors kept whatever top-k and top-p say, length B.

    Returns:
        The candidates of each row; K is the largest count.

    Source: TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper of transformers, in that order.
    """
    device, vocab_size = logits.device, logits.shape[-1]

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)[:, None]  # (B, 1)

    raw = logits.float()
    scores = raw / column(temperature)  # (B, V)
    kept = column([min(max(k, m), vocab_size) for k, m in zip(top_k, min_candidates, strict=True)], torch.long)
    width = min(int(kept.max()) + 8, vocab_size)  # a few more than asked, to see ties across the top-k boundary
    while True:
        values, token_ids = scores.topk(width)
        kth = values.gather(1, kept - 1)
        if width == vocab_size or bool(((values[:, -1:] < kth) | kth.isneginf()).all()):  # -inf: fewer are allowed
            break
        width = min(2 * width, vocab_size)
    token_ids, by_id = token_ids.sort(dim=-1)  # topk leaves ties in any order: make it (value down, id up)
    values, by_value = values.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    token_ids = token_ids.gather(1, by_value)

    values = values.masked_fill(values < kth, -torch.inf)
    tail = values.softmax(-1).flip(-1).cumsum(-1).flip(-1)  # (B, K): probability of this candidate and all after it
    removed_mass = 1.0 - column(top_p)
    live = (tail > removed_mass) & values.isfinite()
    close = ((tail - removed_mass).abs() < _BOUNDARY_GUARD) & (column(top_p) < 1.0)
    for row in close.any(-1).nonzero()[:, 0].tolist():
        live[row] = torch.arange(live.shape[1], device=device) < _top_p_count(scores[row], kth[row], top_p[row])
    floor = torch.arange(width, device=device) < column(min_candidates, torch.long)
    live = live | (floor & values.isfinite())

    counts = live.sum(-1)
    widest = int(counts.max())
    token_ids, live = token_ids[:, :widest], live[:, :widest]
    weights = values[:, :widest].masked_fill(~live, -torch.inf).softmax(-1)
    after = weights.flip(-1).cumsum(-1).flip(-1)[:, 1:]  # (B, K-1): probability left once this candidate is passed over
    after = torch.cat([after, torch.zeros_like(weights[:, :1])], dim=-1)
    hazard_logits = (weights.log() - after.log()).nan_to_num(0.0).clamp(-MAX_HAZARD_LOGIT, MAX_HAZARD_LOGIT)
    log_probs = raw.gather(1, token_ids) - raw.logsumexp(-1, keepdim=True)
    return Candidates(token_ids, log_probs, hazard_logits, counts)


def _top_p_count(scores: Tensor, kth: Tensor, top_p: float) -> int:
    """How many survive top-p, summed over the whole vocabulary in transformers' order; `scores` has shape (V,)."""
    ascending = scores.masked_fill(scores < kth, -torch.inf).sort().values
    removed = ascending.softmax(-1).cumsum(-1) <= 1.0 - top_p
    removed[-1] = False
    return int((~removed).sum())
