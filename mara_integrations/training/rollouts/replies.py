"""Replies with the hidden states of their tokens: what heads are fitted on.

`sample_replies` lets the model generate them, through the decoder that also serves; `read_replies` feeds texts that
exist already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mara_integrations.engine.backends.protocol import Backend, Segment
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.request import Request
from mara_integrations.engine.sequence import JudgedPosition
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Prompt
from mara_integrations.models.load import LoadedModel
from mara_integrations.replies.text import TextStream
from mara_integrations.sampling import GateParams, SamplingParams

_TOKENS_PER_FORWARD = 1024  # while reading: with more, a CPU gains nothing and memory grows

OnReply: TypeAlias = Callable[[int], None]  # called with the number of replies that were just finished


class GivenReply(NamedTuple):
    """A reply that exists as text.

    Attributes:
        prompt_index: Number of its prompt among the prompts of the data.
        prompt: The prompt.
        text: The reply.
    """

    prompt_index: int
    prompt: Prompt
    text: str


@dataclass(slots=True)
class Reply:
    """One reply and its hidden states.

    Attributes:
        prompt_index: Number of its prompt among the prompts it was generated for.
        text: Text without special tokens.
        token_ids: Its T tokens.
        states: Hidden states of the last prompt token and of each reply token, half precision, (T + 1, d).
        positions: Candidates that the gate saw at each position; empty for replies that were read.
        log_probs: Log-probabilities of the tokens under the base model, in nats; empty for replies that were read.
    """

    prompt_index: int
    text: str
    token_ids: tuple[int, ...]
    states: Tensor
    positions: list[JudgedPosition] = field(default_factory=list)
    log_probs: tuple[float, ...] = ()


def sample_replies(
    model: LoadedModel,
    decoder: Decoder,
    prompts: Sequence[Prompt],
    *,
    sampling: SamplingParams,
    replies_per_prompt: int = 1,
    seed: int = 0,
    head: MARAHead | None = None,
    gate: GateParams | None = None,
    keep_positions: bool = False,
    on_reply: OnReply | None = None,
) -> list[Reply]:
    """Let the model generate replies, gated where a head is given.

    Args:
        model: The base model.
        decoder: A decoder on that model, idle.
        prompts: Conversations; one that fills the context window keeps its last tokens.
        sampling: Sampling settings of every reply, but for the seed.
        replies_per_prompt: Number of replies to each prompt.
        seed: Seed of the first reply; each further reply has the next one.
        head: Head that gates the replies.
        gate: Settings of the gate; None is the default of the head's form.
        keep_positions: Keep the states of all candidates that were visited; needs a head.
        on_reply: Called with 1 for each finished reply.

    Returns:
        The replies, prompt by prompt.
    """
    requests = []
    for i, prompt in enumerate(prompts):
        prompt_ids = model.encoder.encode(prompt)[-(model.context_window - 1) :]
        max_new_tokens = min(sampling.max_new_tokens, model.context_window - len(prompt_ids))
        for j in range(replies_per_prompt):
            text = TextStream(model.tokenizer, model.encoder.stop_for(prompt))
            requests.append(
                Request(
                    prompt_ids,
                    sampling.updated(seed=seed + i * replies_per_prompt + j, max_new_tokens=max_new_tokens),
                    gate or GateParams(),
                    head=head,
                    eos_token_ids=model.eos_token_ids,
                    text=text,
                    keep_states=True,
                    keep_positions=keep_positions,
                )
            )
    finished = decoder.run(requests, (lambda _: on_reply(1)) if on_reply else None)
    return [
        Reply(
            index // replies_per_prompt,
            sequence.request.text.text if sequence.request.text else "",
            tuple(sequence.token_ids),
            torch.stack(sequence.states).half().cpu(),
            sequence.positions,
            tuple(sequence.log_probs),
        )
        for index, sequence in enumerate(finished)
    ]


@torch.inference_mode()
def read_replies(
    model: LoadedModel,
    backend: Backend,
    given: Sequence[GivenReply],
    *,
    max_tokens: int,
    on_reply: OnReply | None = None,
) -> list[Reply]:
    """Feed replies that exist as text, and keep their hidden states.

    Args:
        model: The base model.
        backend: A backend on that model.
        given: The replies.
        max_tokens: Number of tokens after which a longer reply is cut, see `encode_given`.
        on_reply: Called with the size of each batch.
    """
    encoded = [encode_given(model, reply, max_tokens) for reply in given]
    states: dict[int, Tensor] = {}
    for batch in _batches([len(prompt_ids) + len(reply_ids) for prompt_ids, reply_ids in encoded]):
        states.update(zip(batch, _states(backend, [encoded[i] for i in batch]), strict=True))
        if on_reply is not None:
            on_reply(len(batch))
    replies = []
    for i, (_, reply_ids) in enumerate(encoded):
        text = model.tokenizer.decode(reply_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        replies.append(Reply(given[i].prompt_index, text, tuple(reply_ids), states[i]))
    return replies


def encode_given(model: LoadedModel, reply: GivenReply, max_tokens: int) -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt and of its reply, cut to the model's context window.

    The reply is cut first, to `max_tokens` and so that one token of the prompt fits before it. The prompt then keeps
    its last tokens.
    """
    longest = min(max_tokens, model.context_window - 1)
    reply_ids = model.tokenizer(reply.text, add_special_tokens=False).input_ids[:longest]
    return model.encoder.encode(reply.prompt)[-(model.context_window - len(reply_ids)) :], reply_ids


def _states(backend: Backend, encoded: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
    """Return the states of each prompt's last token and of its reply's tokens, (T + 1, d); feed each prompt once."""
    rows: list[int] = []
    try:
        prompts = {tuple(prompt_ids): len(prompt_ids) for prompt_ids, _ in encoded}
        sources = {prompt: backend.open() for prompt in prompts}
        rows += sources.values()
        fed = backend.feed([Segment(sources[prompt], prompt) for prompt in prompts]).split(list(prompts.values()))
        last_states = {prompt: hidden[-1:] for prompt, hidden in zip(prompts, fed, strict=True)}
        segments = []
        for prompt_ids, reply_ids in encoded:
            row = backend.fork(sources[tuple(prompt_ids)])
            rows.append(row)
            segments.append(Segment(row, reply_ids))
        hidden = backend.feed(segments).split([len(segment.token_ids) for segment in segments])
    finally:
        for row in rows:
            backend.close(row)
    pairs = zip(encoded, hidden, strict=True)
    return [torch.cat([last_states[tuple(prompt_ids)], states]).half().cpu() for (prompt_ids, _), states in pairs]


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Return indices in batches of bounded size, in order, so that replies to one prompt stay together."""
    batches: list[list[int]] = []
    room = 0
    for i in range(len(lengths)):
        if not batches or lengths[i] > room:
            batches.append([])
            room = _TOKENS_PER_FORWARD
        batches[-1].append(i)
        room -= lengths[i]
    return batches


def token_texts(model: LoadedModel, token_ids: Sequence[int], last: int | None = None) -> list[str]:
    """Return the text of a reply after each of its tokens; an unfinished character counts once it is whole.

    Args:
        model: The model whose tokens they are.
        token_ids: Tokens of the reply.
        last: Number of last tokens to return a text for; None is all.
    """
    decode = model.tokenizer.decode
    return [
        decode(list(token_ids[: t + 1]), skip_special_tokens=True, clean_up_tokenization_spaces=False).rstrip("\ufffd")
        for t in range(len(token_ids) - (last or len(token_ids)), len(token_ids))
    ]
