"""Replies with the hidden states of their tokens: what heads are fitted on.

They come from two places: texts that were written already are fed to the model as they stand (`read_replies`); where
there are none, the model writes some (`sample_replies`), through the same decoder that serves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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

# Tokens in one forward while reading: past this a CPU gains nothing and memory grows.
_READ_BUDGET = 1024

OnReply = Callable[[int], None]


@dataclass(slots=True)
class Reply:
    """One reply and its states.

    Attributes:
        prompt: Which prompt it answers, an index.
        text: Without special tokens.
        token_ids: T tokens.
        states: Of the last prompt token and of each reply token, half precision, (T + 1, d).
        positions: What the gate saw while the reply was written; empty for replies that were read.
        log_probs: Of the tokens under the base model, in nats; empty for replies that were read.
    """

    prompt: int
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
    replies_each: int = 1,
    seed: int = 0,
    head: MARAHead | None = None,
    gate: GateParams | None = None,
    keep_positions: bool = False,
    on_reply: OnReply | None = None,
) -> list[Reply]:
    """Let the model write replies, gated where a head is given.

    Args:
        model: The base model.
        decoder: On that model; idle.
        prompts: Conversations.
        sampling: Of every reply; its seed is replaced by one of each reply's own.
        replies_each: Replies to each prompt.
        seed: First of the seeds.
        head: Gates the replies.
        gate: How; left out, as its form has it.
        keep_positions: Keep the states of all candidates that were visited, for heads only.
        on_reply: Called with 1 for each finished reply.

    Returns:
        Prompt by prompt.
    """
    requests = []
    for i, prompt in enumerate(prompts):
        prompt_ids = model.encoder.encode(prompt)
        room = max(1, model.context_window - len(prompt_ids))
        for j in range(replies_each):
            own = sampling.updated(seed=seed + i * replies_each + j, max_new_tokens=min(sampling.max_new_tokens, room))
            text = TextStream(model.tokenizer, model.encoder.stop_for(prompt))
            requests.append(
                Request(
                    prompt_ids,
                    own,
                    gate or GateParams(),
                    head=head,
                    eos_token_ids=model.eos_token_ids,
                    text=text,
                    keep_states=True,
                    keep_positions=keep_positions,
                )
            )
    done = decoder.run(requests, (lambda _: on_reply(1)) if on_reply else None)
    return [
        Reply(
            index // replies_each,
            sequence.request.text.text if sequence.request.text else "",
            tuple(sequence.token_ids),
            torch.stack(sequence.states).half().cpu(),
            sequence.positions,
            tuple(sequence.log_probs),
        )
        for index, sequence in enumerate(done)
    ]


@torch.inference_mode()
def read_replies(
    model: LoadedModel,
    backend: Backend,
    texts: Sequence[tuple[int, Prompt, str]],
    *,
    max_tokens: int,
    on_reply: OnReply | None = None,
) -> list[Reply]:
    """Feed replies that were written already.

    Args:
        model: The base model.
        backend: On that model.
        texts: Prompt index, prompt and reply of each.
        max_tokens: Reply tokens read; a longer reply is cut, see `encode_given`.
        on_reply: Called with the count of each batch.
    """
    encoded = [encode_given(model, prompt, text, max_tokens) for _, prompt, text in texts]
    states: dict[int, Tensor] = {}
    for batch in _batches([len(p) + len(r) for p, r in encoded]):
        states.update(zip(batch, _read(backend, [encoded[i] for i in batch]), strict=True))
        if on_reply is not None:
            on_reply(len(batch))
    replies = []
    for i, (_, reply_ids) in enumerate(encoded):
        text = model.tokenizer.decode(reply_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        replies.append(Reply(texts[i][0], text, tuple(reply_ids), states[i]))
    return replies


def encode_given(model: LoadedModel, prompt: Prompt, reply: str, max_tokens: int) -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt and of a given reply, cut to the model's window.

    The reply is cut first, to `max_tokens` and so that a token of the prompt fits before it. The prompt then keeps its
    last tokens.
    """
    reply_ids = model.tokenizer(reply, add_special_tokens=False).input_ids[: min(max_tokens, model.context_window - 1)]
    return model.encoder.encode(prompt)[-(model.context_window - len(reply_ids)) :], reply_ids


def _read(backend: Backend, encoded: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
    """States of prompts' last and replies' tokens, (T + 1, d) each; a prompt of several replies is fed once."""
    rows: list[int] = []
    try:
        prompts = {tuple(prompt_ids): len(prompt_ids) for prompt_ids, _ in encoded}
        sources = {prompt: backend.open() for prompt in prompts}
        rows += sources.values()
        fed = backend.feed([Segment(sources[prompt], prompt) for prompt in prompts]).split(list(prompts.values()))
        tips = {prompt: hidden[-1:] for prompt, hidden in zip(prompts, fed, strict=True)}
        segments = []
        for prompt_ids, reply_ids in encoded:
            prompt = tuple(prompt_ids)
            row = backend.fork(sources[prompt])
            rows.append(row)
            segments.append(Segment(row, reply_ids))
        hidden = backend.feed(segments).split([len(segment.token_ids) for segment in segments])
    finally:
        for row in rows:
            backend.close(row)
    pairs = zip(encoded, hidden, strict=True)
    return [torch.cat([tips[tuple(prompt_ids)], states]).half().cpu() for (prompt_ids, _), states in pairs]


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in batches of bounded size, in order, so that replies to one prompt stay together."""
    batches: list[list[int]] = []
    room = 0
    for i in range(len(lengths)):
        if not batches or lengths[i] > room:
            batches.append([])
            room = _READ_BUDGET
        batches[-1].append(i)
        room -= lengths[i]
    return batches


def token_texts(model: LoadedModel, token_ids: Sequence[int], last: int | None = None) -> list[str]:
    """The reply's text after each of its tokens; an unfinished character counts once it is whole.

    Args:
        model: Whose tokens they are.
        token_ids: Of the reply.
        last: After the last so many tokens only.
    """
    decode = model.tokenizer.decode
    return [
        decode(list(token_ids[: t + 1]), skip_special_tokens=True, clean_up_tokenization_spaces=False).rstrip("\ufffd")
        for t in range(len(token_ids) - (last or len(token_ids)), len(token_ids))
    ]
