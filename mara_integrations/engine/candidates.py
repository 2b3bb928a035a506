"""From logits to ranked candidates: temperature, then top-k, then top-p, exactly as transformers filters them.

Knows one position of each of B sequences; does not know heads, gates or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# A row whose sum lands this close to the top-p boundary is decided again by transformers' own sum.
_BOUNDARY_GUARD = 1e-5
# Scores looked at beyond those that top-k keeps, to see ties across the boundary.
SPARE_COLUMNS = 8
# A hazard of 1 - 1e-13: further out the accept logit would drown any head, and the last candidate's is infinite.
MAX_HAZARD_LOGIT = 30.0


class Ranking(NamedTuple):
    """Candidates of one position, without padding; see `Candidates`.

    Attributes:
        token_ids: Candidates, most probable first, K of them.
        log_probs: Log-probabilities of the candidates.
        hazard_logits: Hazard logits of the candidates under the base model.
        accept_logits: Accept logits by the scores of Q-heads; without such heads the hazard logits.
    """

    token_ids: list[int]
    log_probs: list[float]
    hazard_logits: list[float]
    accept_logits: list[float]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Ranked candidates of B positions, padded to K columns, on the CPU.

    Attributes:
        token_ids: Most probable first, ties by token id, shape (B, K).
        log_probs: Log-probabilities over the whole vocabulary at temperature 1, in nats, shape (B, K).
        hazard_logits: Logit of the base model's hazard, its probability of this candidate given that all before it were
            passed over, from the filtered and renormalised distribution; clamped to +-30, shape (B, K).
        counts: Live candidates of each row, shape (B,); 0 where logits are NaN, infinite, or all -inf.
        accept_logits: Accept logits by the scores of Q-heads; without such heads the hazard logits, shape (B, K).
    """

    token_ids: Tensor
    log_probs: Tensor
    hazard_logits: Tensor
    counts: Tensor
    accept_logits: Tensor

    @property
    def live(self) -> Tensor:
        """Which columns hold candidates, (B, K)."""
        return torch.arange(self.token_ids.shape[1]) < self.counts[:, None]

    def rankings(self) -> list[Ranking]:
        """Row by row."""
        tensors = (self.token_ids, self.log_probs, self.hazard_logits, self.accept_logits)
        rows = zip(self.counts.tolist(), *(column.tolist() for column in tensors), strict=True)
        return [Ranking(*(values[:count] for values in row)) for count, *row in rows]


def rank_candidates(
    logits: Tensor,
    *,
    top_k: Sequence[int],
    top_p: Sequence[float],
    temperature: Sequence[float],
    min_candidates: Sequence[int],
) -> Candidates:
    """Rank the candidates of each row; waits for the device once.

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
    raw = logits.float()
    scores = raw / torch.tensor(temperature, dtype=torch.float32, device=raw.device)[:, None]  # (B, V)
    floor = torch.tensor(min_candidates)[:, None]
    num_kept = [max(k, least) for k, least in zip(top_k, min_candidates, strict=True)]
    values, token_ids, log_probs = _filter_top_k(scores, raw, num_kept)
    live = _filter_top_p(values, scores, top_p, floor)
    live &= ~log_probs[:, :1].isnan()  # what is not finite in a row is in the sum over its vocabulary
    counts = live.sum(-1)
    widest = int(counts.max())
    hazards = _hazard_logits(values[:, :widest], live[:, :widest])
    return Candidates(token_ids[:, :widest], log_probs[:, :widest], hazards, counts, hazards)


def keep_top_k(values: Tensor, num_kept: Tensor) -> Tensor:
    """Return the scores that top-k keeps, -inf for the others; waits for no device.

    Args:
        values: Highest scores, highest first, shape (B, K).
        num_kept: How many are kept by value, from 1 to K, shape (B, 1); those tied with the last one stay.
    """
    return values.masked_fill(values < values.gather(1, num_kept - 1), -torch.inf)


def keep_top_p(values: Tensor, removed_mass: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of the scores top-p keeps; waits for no device.

    Args:
        values: Scores after top-k, highest first, -inf where not kept, shape (B, K).
        removed_mass: 1 - top_p, shape (B, 1).
        floor: Number of scores kept whatever top-p says, shape (B, 1).

    Returns:
        Which are kept, bool; the probability of each and all after it; shape (B, K) each.
    """
    tail = values.softmax(-1).flip(-1).cumsum(-1).flip(-1)
    is_kept = (tail > removed_mass) | (torch.arange(values.shape[1], device=values.device) < floor)
    return is_kept & values.isfinite(), tail


def _filter_top_k(scores: Tensor, raw: Tensor, num_kept: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the `num_kept` highest scores of each row and those tied with the last of them.

    Returns:
        Scores, -inf where not kept; token ids; log-probabilities. Shape (B, K) each, highest first, on the CPU.
    """
    vocab_size = scores.shape[-1]
    num_kept = [min(count, vocab_size) for count in num_kept]
    width = min(max(num_kept) + SPARE_COLUMNS, vocab_size)
    while True:
        values, token_ids, log_probs = _highest(scores, raw, width)
        counts = torch.tensor(num_kept)[:, None]
        last_kept = values.gather(1, counts - 1)
        sees_all_ties = (values[:, -1:] < last_kept) | ~last_kept.isfinite()  # -inf: fewer tokens are allowed
        if width == vocab_size or bool(sees_all_ties.all()):
            return keep_top_k(values, counts), token_ids, log_probs
        width = min(2 * width, vocab_size)


def _filter_top_p(values: Tensor, scores: Tensor, top_p: Sequence[float], floor: Tensor) -> Tensor:
    """Return which of the kept candidates top-p keeps too, (B, K) bool.

    Args:
        values: Scores after top-k, highest first, -inf where not kept, (B, K).
        scores: Scores of the whole vocabulary, (B, V), for rows that are too close to call.
        top_p: Length B.
        floor: How many are kept whatever top-p says, (B, 1).
    """
    shares = torch.tensor(top_p, dtype=torch.float64)[:, None]  # in float32 a share just below 1 would be 1
    removed_mass = (1.0 - shares).float()
    live, tail = keep_top_p(values, removed_mass, floor)
    too_close = ((tail - removed_mass).abs() < _BOUNDARY_GUARD) & (shares < 1.0)  # never where logits are NaN
    for row in too_close.any(-1).nonzero()[:, 0].tolist():
        is_kept = values[row].isfinite()
        count = _top_p_count(scores[row], float(values[row][is_kept][-1]), top_p[row])
        live[row] = (torch.arange(values.shape[1]) < max(count, int(floor[row]))) & is_kept
    return live


def _hazard_logits(values: Tensor, live: Tensor) -> Tensor:
    """Hazard logits of the live candidates, see `Candidates`; scores and live (B, K), highest first."""
    weights = values.masked_fill(~live, -torch.inf).softmax(-1)
    after = weights.flip(-1).cumsum(-1).flip(-1)[:, 1:]  # (B, K-1): probability left once this candidate is passed over
    after = torch.cat([after, torch.zeros_like(weights[:, :1])], dim=-1)
    return (weights.log() - after.log()).nan_to_num(0.0).clamp(-MAX_HAZARD_LOGIT, MAX_HAZARD_LOGIT)


def _highest(scores: Tensor, raw: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the highest scores of each row, their token ids and log-probabilities, (B, width) each, on the CPU."""
    values, token_ids = scores.topk(width)
    log_probs = raw.gather(1, token_ids) - raw.logsumexp(-1, keepdim=True)
    packed = torch.stack([values, token_ids.float(), log_probs]).cpu()  # ids are exact in float32 up to 2^24
    by_id = packed[1].sort(dim=-1).indices  # topk leaves ties in any order: make it (value down, id up)
    by_value = packed[0].gather(1, by_id).sort(dim=-1, descending=True, stable=True).indices
    values, ids, log_probs = packed.gather(2, by_id.gather(1, by_value).expand_as(packed))
    return values, ids.long(), log_probs


def _top_p_count(scores: Tensor, last_kept: float, top_p: float) -> int:
    """Count the survivors of top-p, summed over the whole vocabulary in transformers' order; `scores` is (V,)."""
    ascending = scores.masked_fill(scores < last_kept, -torch.inf).sort().values
    removed = ascending.softmax(-1).cumsum(-1) <= 1.0 - top_p
    removed[-1] = False
    return int((~removed).sum())
