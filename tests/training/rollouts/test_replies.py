"""Replies as tokens and states: what does not fit the model's window is cut, prompt and reply alike."""

from __future__ import annotations

import pytest
import torch

from mara_integrations.engine.backends.select import make_backend
from mara_integrations.messages import Message
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import tiny_model, tiny_tokenizer
from mara_integrations.training.rollouts.decisions import read_decisions
from mara_integrations.training.rollouts.replies import GivenReply, encode_given, read_replies

WINDOW = 512


@pytest.fixture(scope="module", params=["llama", "gpt2"])  # gpt2 has no state for a position past its window
def model(request):
    return load_model(ModelSpec((tiny_model(request.param), tiny_tokenizer())))


@pytest.mark.parametrize("length", [1, 300, WINDOW - 1, WINDOW, WINDOW + 100])
def test_prompt_and_reply_fit_the_window_together(model, length):
    prompt = (Message("user", "p" * 300),)
    given = GivenReply(0, prompt, "r" * length)
    prompt_ids, reply_ids = encode_given(model, given, max_tokens=1000)
    assert len(reply_ids) == min(length, WINDOW - 1)
    assert 1 <= len(prompt_ids) <= WINDOW - len(reply_ids)
    assert model.encoder.encode(prompt)[-len(prompt_ids) :] == prompt_ids, "the prompt keeps its end"

    (read,) = read_replies(model, make_backend(model.model), [given], max_tokens=1000)
    assert read.states.shape[0] == len(reply_ids) + 1
    assert torch.isfinite(read.states).all()


def test_decisions_are_read_within_the_window_too(model):
    given = [GivenReply(0, (Message("user", "p" * 300),), "r" * WINDOW)]
    sampling = SamplingParams(max_new_tokens=1000, temperature=1.0)
    decisions = read_decisions(model, make_backend(model.model), given, sampling=sampling)
    assert int(decisions.tokens.max()) < WINDOW
