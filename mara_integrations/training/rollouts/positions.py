"""Positions of replies with all their candidates, padded to one table: what Q-heads are fitted to.

A plain reply says all that is needed: the state before each token, which the logits were made of, and the candidates
there. Nothing but the tokens taken was ever fed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from mara_integrations.engine.candidates import rank_candidates
from mara_integrations.engine.gate import gated_log_probs
from mara_integrations.heads.q import QHead
from mara_integrations.sampling import SamplingParams
from mara_integrations.training.records.memory_mapped import joined
from mara_integrations.training.rollouts.replies import Reply

Embeddings: TypeAlias = Callable[[Tensor], Tensor]  # token ids (N,) to rows of the output embeddings (N, d)
_CHUNK, _READ_CHUNK = 4096, 128  # positions scored at once, and ranked by the logits of the whole vocabulary


@dataclass(frozen=True, slots=True)
class Positions:
    """P positions with K candidates each, padded; positions with a lone candidate are left out.

    Attributes:
        states: Hidden state before each position, half precision, (P, d).
        token_ids: Candidates, most probable first, 0 where there is none, (P, K).
        log_probs: Log-probabilities of the candidates among themselves under the base model, -inf where there is none,
            (P, K).
        taken: Column of the token that the reply goes on with, (P,).
        replies: The reply each position belongs to, (P,).
        places: Its place in the reply, (P,).
        num_tokens: Tokens of all replies, those with a lone candidate counted.
    """

    states: Tensor
    token_ids: Tensor
    log_probs: Tensor
    taken: Tensor
    replies: Tensor
    places: Tensor
    num_tokens: int

    def __len__(self) -> int:
        return len(self.taken)

    @property
    def live(self) -> Tensor:
        """Which columns are candidates, (P, K)."""
        return self.log_probs.isfinite()

    @classmethod
    def of(cls, replies: Sequence[Reply]) -> Positions:
        """Positions of replies that were written under a Q-head, trained or not, their positions kept."""
        found = [(r, reply, position) for r, reply in enumerate(replies) for position in reply.positions]
        counts = torch.tensor([len(position.token_ids) for _, _, position in found], dtype=torch.long)
        width = max(counts.tolist(), default=1)
        token_ids, hazard_logits = (
            torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=dtype).reshape(-1, width)
            for rows, dtype in (
                ([position.token_ids for _, _, position in found], torch.long),
                ([position.hazard_logits for _, _, position in found], torch.float),
            )
        )
        live = torch.arange(width) < counts[:, None]
        taken = [position.token_ids.index(reply.token_ids[position.index]) for _, reply, position in found]
        width_of_states = replies[0].states.shape[1]
        return cls(
            joined([reply.states[[p.index for p in reply.positions]] for reply in replies])
            if found
            else torch.zeros(0, width_of_states, dtype=torch.half),
            token_ids,
            gated_log_probs(hazard_logits, live),
            torch.tensor(taken, dtype=torch.long),
            torch.tensor([r for r, _, _ in found], dtype=torch.long),
            torch.tensor([position.index for _, _, position in found], dtype=torch.long),
            sum(len(reply.token_ids) for reply in replies),
        )

    @classmethod
    def join(cls, parts: Sequence[Positions]) -> Positions:
        """All positions of the parts in order; replies are numbered on."""
        starts, start = [], 0
        for part in parts:
            starts.append(start)
            start += int(part.replies.max()) + 1 if len(part) else 0
        numbered = [replace(part, replies=part.replies + first) for part, first in zip(parts, starts, strict=True)]
        return _concatenated(numbered)

    def narrowed(self, width: int) -> Positions:
        """Keep the `width` most probable candidates, and the one taken in a column of its own where it is no such.

        The log-probabilities stay those among all candidates.
        """
        room = max(0, width - self.token_ids.shape[1])
        columns = [pad(self.token_ids, (0, room))[:, :width]]
        values = [pad(self.log_probs, (0, room), value=-torch.inf)[:, :width]]
        is_beyond = self.taken >= width
        own_id, own = (tensor.gather(1, self.taken[:, None]) for tensor in (self.token_ids, self.log_probs))
        columns.append(own_id)
        values.append(own.masked_fill(~is_beyond[:, None], -torch.inf))
        return replace(
            self,
            token_ids=torch.cat(columns, 1),
            log_probs=torch.cat(values, 1),
            taken=torch.where(is_beyond, width, self.taken),
        )

    def narrowed_values(self, values: Tensor, width: int) -> Tensor:
        """Return values of the candidates, (P, K), in the columns of `narrowed`; 0 where there is no candidate."""
        own = values.gather(1, self.taken[:, None]).masked_fill((self.taken < width)[:, None], 0.0)
        return torch.cat([pad(values, (0, max(0, width - values.shape[1])))[:, :width], own], 1)

    def only_taken(self) -> Positions:
        """Keep the token taken alone, with probability 1."""
        token_ids = self.token_ids.gather(1, self.taken[:, None])
        return replace(
            self, token_ids=token_ids, log_probs=torch.zeros(token_ids.shape), taken=torch.zeros_like(self.taken)
        )

    def rows_of(self, replies: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the positions of these replies are, reply by reply, and how many each has, (R,)."""
        num_replies = int(max(replies.max(), self.replies.max())) + 1
        counts = self.replies.bincount(minlength=num_replies)
        starts, own = (counts.cumsum(0) - counts)[replies], counts[replies]
        within = torch.arange(int(own.sum())) - (own.cumsum(0) - own).repeat_interleave(own)
        return starts.repeat_interleave(own) + within, own

    def take(self, rows: Tensor) -> Positions:
        """The named positions; `num_tokens` stays."""
        return Positions(
            self.states[rows],
            self.token_ids[rows],
            self.log_probs[rows],
            self.taken[rows],
            self.replies[rows],
            self.places[rows],
            self.num_tokens,
        )


def join_columns(tables: Sequence[Tensor], missing: float = 0.0) -> Tensor:
    """Return all rows of tables of candidates, (P, K) each, in order, with `missing` where one has fewer columns."""
    width = max(table.shape[1] for table in tables)
    return torch.cat([pad(table, (0, width - table.shape[1]), value=missing) for table in tables])


def _concatenated(parts: Sequence[Positions]) -> Positions:
    """All positions of parts whose replies are numbered already."""
    return Positions(
        joined([part.states for part in parts]),
        join_columns([part.token_ids for part in parts]),
        join_columns([part.log_probs for part in parts], missing=-torch.inf),
        torch.cat([part.taken for part in parts]),
        torch.cat([part.replies for part in parts]),
        torch.cat([part.places for part in parts]),
        sum(part.num_tokens for part in parts),
    )


@dataclass(frozen=True, slots=True)
class GivenPositions:
    """Positions of replies that were not generated here.

    Attributes:
        positions: Positions whose token is one of several candidates.
        outside: Reply and place of each token that is no candidate, (N, 2): no head can make it more or less probable.
        num_lone: Tokens that are the only candidate.
    """

    positions: Positions
    outside: Tensor
    num_lone: int


@torch.inference_mode()
def positions_of_given(
    replies: Sequence[Reply], logits: Callable[[Tensor], Tensor], sampling: SamplingParams
) -> GivenPositions:
    """Return the positions of replies that were read, from the states that were kept.

    Args:
        replies: At least one reply, with its states.
        logits: Next-token logits of states, (N, d) to (N, V).
        sampling: Which tokens are candidates.
    """
    kept, outside, num_lone = [], [], 0
    states = joined([reply.states[:-1] for reply in replies])
    tokens = torch.tensor([token for reply in replies for token in reply.token_ids])
    owners = torch.tensor([r for r, reply in enumerate(replies) for _ in reply.token_ids])
    places = torch.tensor([place for reply in replies for place in range(len(reply.token_ids))])
    for rows in torch.arange(len(tokens)).split(_READ_CHUNK):
        count = len(rows)
        found = rank_candidates(
            logits(states[rows].float()),
            top_k=[sampling.top_k] * count,
            top_p=[sampling.top_p] * count,
            temperature=[sampling.temperature or 1.0] * count,
            min_candidates=[sampling.min_candidates] * count,
        )
        is_taken = (found.token_ids == tokens[rows, None]) & found.live
        is_kept = is_taken.any(-1) & (found.counts > 1)
        beyond = rows[~is_taken.any(-1)]
        outside.append(torch.stack([owners[beyond], places[beyond]], dim=1))
        num_lone += int((is_taken.any(-1) & (found.counts == 1)).sum())
        own = rows[is_kept]
        kept.append(
            Positions(
                states[own],
                found.token_ids[is_kept],
                gated_log_probs(found.hazard_logits, found.live)[is_kept],
                is_taken[is_kept].int().argmax(-1),
                owners[own],
                places[own],
                count,
            )
        )
    return GivenPositions(_concatenated(kept), torch.cat(outside), num_lone)


def q_scores(head: QHead, states: Tensor, token_ids: Tensor, embeddings: Embeddings) -> Tensor:
    """Scores of candidates, given states (P, d) and token ids (P, K), as (P, K); each distinct token is looked at once.

    Where there is no candidate, the score is that of the token that stands there.
    """
    device = head.device
    tokens, places = token_ids.to(device).unique(return_inverse=True)
    of_tokens = head.candidate_features(embeddings(tokens).to(device))  # (U, r)
    of_states = head.state_features(states.to(device).float())  # (P, r)
    return (of_states[:, None] * of_tokens[places]).sum(-1)


@torch.inference_mode()
def all_scores(head: QHead, positions: Positions, embeddings: Embeddings) -> Tensor:
    """Scores of all candidates, (P, K), on the CPU; 0 where there is none."""
    if not len(positions):
        return torch.zeros(positions.token_ids.shape)
    parts = zip(positions.states.split(_CHUNK), positions.token_ids.split(_CHUNK), strict=True)
    scores = torch.cat([q_scores(head, states, ids, embeddings).float().cpu() for states, ids in parts])
    return scores.masked_fill(~positions.live, 0.0)
