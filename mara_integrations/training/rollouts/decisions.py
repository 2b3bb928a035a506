"""Replies as the accept/reject decisions that produce them, for losses on the gate's likelihood.

`decisions_of` takes them from replies that a gate generated. `read_decisions` finds them in any text, by asking how the
gate would have produced it: each better ranked candidate is rejected, the token of the text is accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mara_integrations.engine.backends.protocol import Backend, Segment
from mara_integrations.engine.candidates import MAX_HAZARD_LOGIT, rank_candidates
from mara_integrations.engine.sequence import JudgedPosition
from mara_integrations.models.load import LoadedModel
from mara_integrations.sampling import SamplingParams
from mara_integrations.training.records.memory_mapped import joined
from mara_integrations.training.rollouts.replies import GivenReply, Reply, encode_given

_REPLIES_PER_FORWARD = 64  # while reading


@dataclass(frozen=True, slots=True)
class Decisions:
    """The N decisions of R replies, reply by reply and in the order they are taken.

    Attributes:
        states: Hidden states of the candidates that are decided on, half precision, (N, d).
        hazard_logits: Logits of the base model's own probability to accept each candidate, (N,).
        accepted: Whether each candidate is accepted, (N,), bool.
        tokens: Index in its reply of the token that each decision is about, (N,).
        counts: Number of decisions of each reply, (R,).
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
        """Index of the reply that each decision belongs to, (N,)."""
        return torch.arange(len(self.counts)).repeat_interleave(self.counts)

    def rows(self, replies: Tensor) -> Tensor:
        """Return the indices of the decisions of some replies, reply by reply."""
        starts = self.counts.cumsum(0) - self.counts
        counts = self.counts[replies]
        inner = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        return starts[replies].repeat_interleave(counts) + inner

    def take(self, replies: Tensor) -> Decisions:
        """Return the decisions of some replies, in the order given."""
        rows = self.rows(replies)
        return Decisions(
            self.states[rows], self.hazard_logits[rows], self.accepted[rows], self.tokens[rows], self.counts[replies]
        )

    @classmethod
    def join(cls, parts: Sequence[Decisions]) -> Decisions:
        """Return the decisions of all parts, in order."""
        names = ("hazard_logits", "accepted", "tokens", "counts")
        others = (torch.cat([getattr(part, name) for part in parts]) for name in names)
        return cls(joined([part.states for part in parts]), *others)


class _DecisionList:
    """Decisions as they are added, a token at a time."""

    def __init__(self, hidden_size: int) -> None:
        self._states: list[Tensor] = [torch.zeros(0, hidden_size, dtype=torch.half)]
        self._hazard_logits: list[float] = []
        self._accepted: list[bool] = []
        self._tokens: list[int] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, token: int, states: Tensor, hazard_logits: Sequence[float], accepted: Sequence[bool]) -> None:
        """Add the decisions about one token of a reply."""
        self._states.append(states.half().cpu())
        self._hazard_logits += hazard_logits
        self._accepted += accepted
        self._tokens += [token] * len(accepted)

    def as_decisions(self, counts: Sequence[int]) -> Decisions:
        """Return all, as those of replies with so many decisions each."""
        hazard_logits, accepted = torch.tensor(self._hazard_logits), torch.tensor(self._accepted, dtype=torch.bool)
        tokens = torch.tensor(self._tokens, dtype=torch.long)
        return Decisions(joined(self._states), hazard_logits, accepted, tokens, torch.tensor(counts))


def taken_rank(reply: Reply, position: JudgedPosition) -> int:
    """Return the rank of the candidate that became the reply's token; a sampling gate has rejected those before it."""
    return position.token_ids.index(reply.token_ids[position.index])


def decisions_of(replies: Sequence[Reply], *, include_forced: bool = False) -> Decisions:
    """Return the decisions by which a gate generated replies.

    Args:
        replies: Replies sampled with a head, with their positions.
        include_forced: Count the last candidate of a position as accepted. The gate takes it without asking the head.
    """
    found, counts = _DecisionList(replies[0].states.shape[1]), []
    for reply in replies:
        before = len(found)
        for position in reply.positions:
            rank = taken_rank(reply, position)
            num_decided = rank + (include_forced or rank < len(position.token_ids) - 1)
            accepted = [False] * rank + [True] * (num_decided - rank)
            hazard_logits = position.hazard_logits[:num_decided]
            found.add(position.index, position.states[:num_decided], hazard_logits, accepted)
        counts.append(len(found) - before)
    return found.as_decisions(counts)


@torch.inference_mode()
def read_decisions(
    model: LoadedModel,
    backend: Backend,
    given: Sequence[GivenReply],
    *,
    sampling: SamplingParams,
    max_competitors: int = 0,
    on_reply: Callable[[int], None] | None = None,
) -> Decisions:
    """Return the decisions by which a gate would have generated replies that exist as text.

    All replies of a batch advance together, one token a forward: the token of the text and its better ranked
    competitors are fed as siblings, and the token of the text is committed. A token that is not a candidate is decided
    on against all others, with its whole probability as hazard. A token that is the last candidate was no decision.

    Args:
        model: The base model.
        backend: A backend on that model.
        given: The replies.
        sampling: Settings that make a token a candidate; replies are cut at `max_new_tokens`.
        max_competitors: Number of better ranked candidates to decide on at each token, the best ones. Those left out
            count as decided as the base model would.
        on_reply: Called with the size of each batch.
    """
    parts: list[Decisions] = []
    for start in range(0, len(given), _REPLIES_PER_FORWARD):
        batch = given[start : start + _REPLIES_PER_FORWARD]
        encoded = [encode_given(model, reply, sampling.max_new_tokens) for reply in batch]
        parts += _read_batch(backend, encoded, sampling, max_competitors)
        if on_reply is not None:
            on_reply(len(batch))
    return Decisions.join(parts)


def _read_batch(
    backend: Backend, encoded: Sequence[tuple[list[int], list[int]]], sampling: SamplingParams, max_competitors: int
) -> list[Decisions]:
    """Return the decisions of each (prompt tokens, reply tokens); feed a prompt of several replies once."""
    rows: list[int] = []
    try:
        sources: dict[tuple[int, ...], tuple[int, Tensor]] = {}  # prompt -> its row and its last state
        for prompt_ids, _ in encoded:
            if tuple(prompt_ids) not in sources:
                rows.append(row := backend.open())
                sources[tuple(prompt_ids)] = row, backend.feed([Segment(row, prompt_ids)])[-1]
        last_states = [sources[tuple(prompt_ids)][1] for prompt_ids, _ in encoded]
        forks = [backend.fork(sources[tuple(prompt_ids)][0]) for prompt_ids, _ in encoded]
        rows += forks
        found = [_DecisionList(len(state)) for state in last_states]
        for t in range(max(len(reply_ids) for _, reply_ids in encoded)):
            live = [i for i, (_, reply_ids) in enumerate(encoded) if t < len(reply_ids)]
            logits = backend.logits(torch.stack([last_states[i] for i in live]))  # (B, V)
            decided = _decided(logits, [encoded[i][1][t] for i in live], sampling, max_competitors)
            segments = [Segment(forks[i], ids, siblings=True) for i, (ids, _) in zip(live, decided, strict=True)]
            hidden = backend.feed(segments).split([len(segment.token_ids) for segment in segments])
            for i, (token_ids, hazard_logits), states in zip(live, decided, hidden, strict=True):
                num_decided, last = len(hazard_logits), len(token_ids) - 1
                found[i].add(t, states[:num_decided], hazard_logits, [k == last for k in range(num_decided)])
                last_states[i] = states[-1]
            backend.commit([segment.row for segment in segments], [len(segment.token_ids) - 1 for segment in segments])
    finally:
        for row in rows:
            backend.close(row)
    return [of_reply.as_decisions([len(of_reply)]) for of_reply in found]


def _decided(
    logits: Tensor, text_tokens: Sequence[int], sampling: SamplingParams, max_competitors: int
) -> list[tuple[list[int], list[float]]]:
    """Return for each row the tokens to feed, the token of the text last, and the hazard logits of those decided on.

    Args:
        logits: Shape (B, V).
        text_tokens: The token of the text in each row, length B.
        sampling: Settings that make a token a candidate.
        max_competitors: As in `read_decisions`.
    """
    count = len(text_tokens)
    candidates = rank_candidates(
        logits,
        top_k=[sampling.top_k] * count,
        top_p=[sampling.top_p] * count,
        temperature=[sampling.temperature or 1.0] * count,
        min_candidates=[sampling.min_candidates] * count,
    )
    ids, hazard_logits = candidates.token_ids.tolist(), candidates.hazard_logits.tolist()
    prob = logits.float().softmax(-1).gather(1, torch.tensor(text_tokens, device=logits.device)[:, None])[:, 0]
    against_all = prob.double().logit().clamp(-MAX_HAZARD_LOGIT, MAX_HAZARD_LOGIT).tolist()
    found = []
    for row, (token, num_candidates) in enumerate(zip(text_tokens, candidates.counts.tolist(), strict=True)):
        if token not in ids[row][:num_candidates]:
            found.append(([token], [against_all[row]]))
            continue
        rank = ids[row].index(token)
        ranks = [*range(min(rank, max_competitors)), rank]
        decided = ranks if rank < num_candidates - 1 else ranks[:-1]  # the last candidate is taken without asking
        found.append(([ids[row][k] for k in ranks], [hazard_logits[row][k] for k in decided]))
    return found
