from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.messages import Conversation, Message
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer
from mara_integrations.training.rollouts.positions import Positions
from mara_integrations.training.rollouts.replies import sample_replies
from mara_integrations.training.rollouts.rereading import contexts_of, reread


@pytest.fixture(scope="module")
def read():
    model = load_model(ModelSpec((tiny_model(), tiny_tokenizer())))
    backend = make_backend(model.model)
    prompts = [Conversation((Message("user", text),)) for text in ("hi", "a longer question", "x")]
    replies = sample_replies(
        model,
        Decoder(backend),
        prompts,
        sampling=SamplingParams(max_new_tokens=7, temperature=1.0),
        replies_per_prompt=3,
        head=random_head(32, "q"),
        keep_positions=True,
    )
    contexts = [model.encoder.encode(prompt.with_system("Be kind to all.")) for prompt in prompts]
    return model, backend, contexts, replies


def test_a_reply_read_again_is_what_the_whole_text_says_from_the_beginning(read):
    model, backend, contexts, replies = read

    found, row, token = reread(backend, contexts, replies), 0, 0

    for reply in replies:
        context = contexts[reply.prompt_index]
        with torch.no_grad():
            logits = model.model(torch.tensor([[*context, *reply.token_ids]])).logits[0, len(context) - 1 : -1]
        log_probs = logits.log_softmax(-1)
        expected = log_probs[range(len(reply.token_ids)), list(reply.token_ids)]
        torch.testing.assert_close(found.tokens[token : token + len(reply.token_ids)], expected, atol=1e-4, rtol=1e-4)
        token += len(reply.token_ids)
        for position in reply.positions:
            own = log_probs[position.index, position.token_ids]
            torch.testing.assert_close(found.candidates[row, : len(own)], own - own.max(), atol=1e-3, rtol=1e-3)
            row += 1
    assert (row, token) == (len(found.candidates), len(found.tokens))


def test_rows_and_columns_are_those_of_positions(read):
    _, backend, contexts, replies = read

    found = reread(backend, contexts, replies).candidates

    assert found.shape == Positions.of(replies).token_ids.shape


def test_without_positions_only_tokens_are_read(read):
    model, backend, contexts, _ = read
    plain = sample_replies(
        model,
        Decoder(backend),
        [Conversation((Message("user", "hi"),))],
        sampling=SamplingParams(max_new_tokens=1),
    )

    found = reread(backend, contexts, plain)

    assert found.candidates.shape[0] == 0 and len(found.tokens) == 1


@pytest.mark.parametrize(("window", "is_cut"), [(60, False), (40, True)])
def test_contexts_keep_room_for_the_longest_reply_to_them(read, window, is_cut):
    model, _, _, replies = read
    prompts = [Conversation((Message("user", "x"),)).with_system("Be kind to all.")] * 3
    whole = model.encoder.encode(prompts[0])
    assert len(whole) == 46

    found = contexts_of(replace(model, context_window=window), prompts, replies)

    assert [len(ids) for ids in found] == [min(46, window - 7)] * 3
    assert all(ids == whole[-len(ids) :] for ids in found) and (len(found[0]) < len(whole)) is is_cut
