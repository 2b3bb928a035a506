"""Replies as the accept/reject decisions they are made of, for losses on the gate's likelihood.

Decisions come from replies the gate wrote itself (`decisions_taken`), or from any text, by asking how the gate would
have come to write it (`read_decisions`): each better ranked candidate rejected, the token that stands there accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mara_integrations.engine.backends.protocol import Backend, Segment
from mara_integrations.engine.candidates import MAX_HAZARD_LOGIT, rank_candidates
from mara_integrations.engine.sequence import JudgedPosition
from mara_integrations.messages import Prompt
from mara_integrations.models.load import LoadedModel
from mara_integrations.sampling import SamplingParams
from mara_integrations.training.records.memory_mapped import joined
from mara_integrations.training.rollouts.replies import Reply, encode_given

_MAX_ROWS = 64  # replies read side by side


@dataclass(frozen=True, slots=True)
class Decisions:
    """Decisions of R replies, N in all, reply by reply and in the order they were taken.

    Attributes:
        states: Of the candidates asked about, half precision, (N, d).
        hazard_logits: Logit of the base model's own probability to accept each, (N,).
        accepted: Whether it was, (N,), bool.
        tokens: Which token of its reply each was about, (N,).
        counts: Decisions of each reply, (R,).
    """

    states: Tensor
    hazard_logits: Tensor
    accepted: Tensor
    tokens: Tensor
    counts: Tensor

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def replies(self) -> Tensor:
        """The reply each decision belongs to, (N,)."""
        return torch.arange(len(self.counts)).repeat_interleave(self.counts)

    def rows(self, replies: Tensor) -> Tensor:
        """Where the decisions of the named replies are, reply by reply."""
        starts = self.counts.cumsum(0) - self.counts
        counts = self.counts[replies]
        inner = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        return starts[replies].repeat_interleave(counts) + inner

    def take(self, replies: Tensor) -> Decisions:
        """Those of the named replies, numbered as named."""
        rows = self.rows(replies)
        return Decisions(
            self.states[rows], self.hazard_logits[rows], self.accepted[rows], self.tokens[rows], self.counts[replies]
        )

    @classmethod
    def join(cls, parts: Sequence[Decisions]) -> Decisions:
        """Those of all the parts, in order."""
        names = ("hazard_logits", "accepted", "tokens", "counts")
        others = (torch.cat([getattr(part, name) for part in parts]) for name in names)
        return cls(joined([part.states for part in parts]), *others)


class _Taken:
    """Decisions as they come."""

    def __init__(self, hidden_size: int) -> None:
        self.states: list[Tensor] = [torch.zeros(0, hidden_size, dtype=torch.half)]
        self.hazard_logits: list[float] = []
        self.accepted: list[bool] = []
        self.tokens: list[int] = []

    def add(self, token: int, states: Tensor, hazard_logits: Sequence[float], accepted: Sequence[bool]) -> None:
        self.states.append(states.half().cpu())
        self.hazard_logits += hazard_logits
        self.accepted += accepted
        self.tokens += [token] * len(accepted)

    def whole(self, counts: Sequence[int]) -> Decisions:
        """Of replies with so many decisions each."""
        hazard_logits, accepted = torch.tensor(self.hazard_logits), torch.tensor(self.accepted, dtype=torch.bool)
        tokens = torch.tensor(self.tokens, dtype=torch.long)
        return Decisions(joined(self.states), hazard_logits, accepted, tokens, torch.tensor(counts))


def taken_rank(reply: Reply, position: JudgedPosition) -> int:
    """Which of a position's candidates the reply went on with; a gate that draws has rejected those before it."""
    return position.token_ids.index(reply.token_ids[position.index])


def decisions_taken(replies: Sequence[Reply], *, with_forced: bool = False) -> Decisions:
    """The decisions by which the gate wrote replies, from what it was shown.

    Args:
        replies: Sampled with a head, their positions kept.
        with_forced: Count the last candidate of a position, which is taken unasked, as accepted.
    """
    taken, counts = _Taken(replies[0].states.shape[1]), []
    for reply in replies:
        before = len(taken.tokens)
        for position in reply.positions:
            rank = taken_rank(reply, position)
            asked = rank + (with_forced or rank < len(position.token_ids) - 1)
            accepted = [False] * rank + [True] * (asked - rank)
            taken.add(position.index, position.states[:asked], position.hazard_logits[:asked], accepted)
        counts.append(len(taken.tokens) - before)
    return taken.whole(counts)


@torch.inference_mode()
def read_decisions(
    model: LoadedModel,
    backend: Backend,
    texts: Sequence[tuple[int, Prompt, str]],
    *,
    sampling: SamplingParams,
    max_competitors: int = 0,
    on_reply: Callable[[int], None] | None = None,
) -> Decisions:
    """The decisions by which a gate would have written replies that stand already.

    All replies advance together, a token a forward: the token that stands there and those it is preferred to are fed
    as siblings, and it is the one committed. A token that is no candidate is asked about against all others, with its
    whole probability as hazard; one that is the last candidate was no decision.

    Args:
        model: The base model.
        backend: On that model.
        texts: Prompt index (not looked at), prompt and reply of each.
        sampling: Which tokens are candidates; replies are cut at its `max_new_tokens`.
        max_competitors: Better ranked candidates asked about at each token, the best ones; what is left out counts as
            decided as the base model would.
        on_reply: Called with the count of each batch.
    """
    parts: list[Decisions] = []
    for start in range(0, len(texts), _MAX_ROWS):
        batch = texts[start : start + _MAX_ROWS]
        encoded = [encode_given(model, prompt, text, sampling.max_new_tokens) for _, prompt, text in batch]
        parts += _read(backend, encoded, sampling, max_competitors)
        if on_reply is not None:
            on_reply(len(batch))
    return Decisions.join(parts)


def _read(
    backend: Backend, encoded: Sequence[tuple[list[int], list[int]]], sampling: SamplingParams, max_competitors: int
) -> list[Decisions]:
    """Decisions of each (prompt tokens, reply tokens); a prompt of several replies is fed once."""
    rows: list[int] = []
    try:
        sources: dict[tuple[int, ...], tuple[int, Tensor]] = {}  # prompt -> its row and its last state
        for prompt_ids, _ in encoded:
            if tuple(prompt_ids) not in sources:
                rows.append(row := backend.open())
                sources[tuple(prompt_ids)] = row, backend.feed([Segment(row, prompt_ids)])[-1]
        tips = [sources[tuple(prompt_ids)][1] for prompt_ids, _ in encoded]
        forks = [backend.fork(sources[tuple(prompt_ids)][0]) for prompt_ids, _ in encoded]
        rows += forks
        taken = [_Taken(len(tip)) for tip in tips]
        for t in range(max(len(reply_ids) for _, reply_ids in encoded)):
            live = [i for i, (_, reply_ids) in enumerate(encoded) if t < len(reply_ids)]
            logits = backend.logits(torch.stack([tips[i] for i in live]))  # (B, V)
            asked = _asked(logits, [encoded[i][1][t] for i in live], sampling, max_competitors)
            fed = [Segment(forks[i], token_ids, siblings=True) for i, (token_ids, _) in zip(live, asked, strict=True)]
            hidden = backend.feed(fed).split([len(segment.token_ids) for segment in fed])
            for i, (token_ids, hazard_logits), states in zip(live, asked, hidden, strict=True):
                count, stands = len(hazard_logits), len(token_ids) - 1
                taken[i].add(t, states[:count], hazard_logits, [k == stands for k in range(count)])
                tips[i] = states[-1]
            backend.commit([segment.row for segment in fed], [len(segment.token_ids) - 1 for segment in fed])
    finally:
        for row in rows:
            backend.close(row)
    return [one.whole([len(one.tokens)]) for one in taken]


def _asked(
    logits: Tensor, stand: Sequence[int], sampling: SamplingParams, max_competitors: int
) -> list[tuple[list[int], list[float]]]:
    """Of each row the tokens to feed, that which stands there last, and the hazard logits of those that are decided.

    Args:
        logits: Shape (B, V).
        stand: The token of each row, length B.
        sampling: Which tokens are candidates.
        max_competitors: As in `read_decisions`.
    """
    count = len(stand)
    candidates = rank_candidates(
        logits,
        top_k=[sampling.top_k] * count,
        top_p=[sampling.top_p] * count,
        temperature=[sampling.temperature or 1.0] * count,
        min_candidates=[sampling.min_candidates] * count,
    )
    ids, hazard_logits = candidates.token_ids.tolist(), candidates.hazard_logits.tolist()
    prob = logits.float().softmax(-1).gather(1, torch.tensor(stand, device=logits.device)[:, None])[:, 0]
    against_all = prob.double().logit().clamp(-MAX_HAZARD_LOGIT, MAX_HAZARD_LOGIT).tolist()
    asked = []
    for row, (token, n) in enumerate(zip(stand, candidates.counts.tolist(), strict=True)):
        if token not in ids[row][:n]:
            asked.append(([token], [against_all[row]]))
            continue
        rank = ids[row].index(token)
        shown = [*range(min(rank, max_competitors)), rank]
        decided = shown if rank < n - 1 else shown[:-1]  # the last candidate is taken unasked
        asked.append(([ids[row][k] for k in shown], [hazard_logits[row][k] for k in decided]))
    return asked
