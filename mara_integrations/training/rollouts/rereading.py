"""Replies read again in another context: what the model would have thought of each candidate there.

Nothing is generated, so that a reply costs one forward in a batch of many. What all contexts begin with, as a system
prompt, is read once, and a prompt once for all replies to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from mara_integrations.engine.backends.protocol import Backend, Segment
from mara_integrations.messages import Prompt
from mara_integrations.models.load import LoadedModel
from mara_integrations.training.rollouts.replies import OnReply, Reply

_TOKENS_PER_FORWARD = 1024  # with more, a CPU gains nothing and memory grows


@dataclass(frozen=True, slots=True)
class Rereading:
    """What a context makes of replies.

    Attributes:
        candidates: Logits of the candidates of each position that the replies kept, less the largest, 0 where there
            is none, (P, K); rows and columns as in `Positions.of`.
        tokens: Log-probabilities of the replies' tokens, over the whole vocabulary, in nats, (T,).
    """

    candidates: Tensor
    tokens: Tensor


def contexts_of(model: LoadedModel, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> list[list[int]]:
    """Return the token ids of prompts; where a prompt and its longest reply do not fit, the prompt's last tokens.

    Args:
        model: The base model.
        prompts: The prompts that the replies are read after, by `Reply.prompt_index`.
        replies: The replies.
    """
    longest: dict[int, int] = {}
    for reply in replies:
        longest[reply.prompt_index] = max(len(reply.token_ids), longest.get(reply.prompt_index, 0))
    rooms = [model.context_window - longest.get(index, 0) for index in range(len(prompts))]
    return [model.encoder.encode(prompt)[-room:] for prompt, room in zip(prompts, rooms, strict=True)]


@torch.inference_mode()
def reread(
    backend: Backend,
    contexts: Sequence[Sequence[int]],
    replies: Sequence[Reply],
    on_reply: OnReply | None = None,
) -> Rereading:
    """Read each reply after its context.

    Args:
        backend: Runs the model.
        contexts: Token ids of the prompts, at least one each, by `Reply.prompt_index`.
        replies: At least one reply; where they kept no positions, there are no candidates.
        on_reply: Called with 1 for each reply.
    """
    positions = [position for reply in replies for position in reply.positions]
    width = max((len(position.token_ids) for position in positions), default=1)
    candidates, row, tokens = torch.zeros(len(positions), width), 0, []
    for reply, states in zip(replies, _states(backend, contexts, replies), strict=True):
        logits = backend.logits(states).float().cpu()  # (T, V)
        taken = torch.tensor(reply.token_ids)[:, None]
        tokens.append((logits.gather(1, taken) - logits.logsumexp(-1, keepdim=True))[:, 0])
        for position in reply.positions:
            ids = torch.tensor(position.token_ids)
            values = logits[position.index, ids]
            candidates[row, : len(ids)] = values - values.max()
            row += 1
        if on_reply is not None:
            on_reply(1)
    return Rereading(candidates, torch.cat(tokens))


def _states(backend: Backend, contexts: Sequence[Sequence[int]], replies: Sequence[Reply]) -> Iterator[Tensor]:
    """Yield the states before each token of each reply, (T, d)."""
    shared = _common_beginning([contexts[reply.prompt_index] for reply in replies])
    root = backend.open()
    try:
        if shared:
            backend.feed([Segment(root, shared)])
        for batch in _batches(contexts, replies, len(shared)):
            yield from _states_of_batch(backend, root, len(shared), contexts, batch)
    finally:
        backend.close(root)


def _states_of_batch(
    backend: Backend, root: int, num_shared: int, contexts: Sequence[Sequence[int]], replies: Sequence[Reply]
) -> list[Tensor]:
    rows: dict[int, int] = {}  # by prompt
    forked: list[int] = []
    try:
        for reply in replies:
            if reply.prompt_index not in rows:
                rows[reply.prompt_index] = backend.fork(root)
        rests = {index: contexts[index][num_shared:] for index in rows}
        hidden = backend.feed([Segment(rows[index], rest) for index, rest in rests.items()])
        ends = dict(zip(rests, hidden.split([len(rest) for rest in rests.values()]), strict=True))
        longer = [reply for reply in replies if len(reply.token_ids) > 1]
        for reply in longer:
            forked.append(backend.fork(rows[reply.prompt_index]))
        segments = [Segment(row, reply.token_ids[:-1]) for row, reply in zip(forked, longer, strict=True)]
        read = iter(backend.feed(segments).split([len(s.token_ids) for s in segments]) if segments else ())
        first = [ends[reply.prompt_index][-1:] for reply in replies]
        return [
            torch.cat([state, next(read)]) if len(reply.token_ids) > 1 else state
            for state, reply in zip(first, replies, strict=True)
        ]
    finally:
        for row in (*rows.values(), *forked):
            backend.close(row)


def _common_beginning(contexts: Sequence[Sequence[int]]) -> list[int]:
    """Return the tokens that all contexts begin with, but for the last token of the shortest."""
    room = min(map(len, contexts)) - 1
    columns = zip(*(context[:room] for context in contexts), strict=True)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def _batches(contexts: Sequence[Sequence[int]], replies: Sequence[Reply], num_shared: int) -> Iterator[Sequence[Reply]]:
    """Yield replies in order, in batches of a bounded number of tokens."""
    start, num_tokens = 0, 0
    for end, reply in enumerate(replies):
        size = len(contexts[reply.prompt_index]) - num_shared + len(reply.token_ids)
        if end > start and num_tokens + size > _TOKENS_PER_FORWARD:
            yield replies[start:end]
            start, num_tokens = end, 0
        num_tokens += size
    yield replies[start:]
