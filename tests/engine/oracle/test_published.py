"""The paper's published layout from end to end: an actor on disk, a text, and the tokens of a reference."""

from __future__ import annotations

import pytest
import torch
from decoding import recomputed_reply

from mara_integrations import MARALLM
from mara_integrations.heads.head import MARAHead
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.runtime import MARAEngine
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer

PROMPT, NUM_TOKENS = "The quick brown fox", 4  # the reference feeds everything anew for each of them


def actor(path, hidden_size, accept_rate, states):
    """A bare state dict of the published layout, with random weights."""
    head = random_head(hidden_size, inner_sizes=(1024, 256), accept_rate=accept_rate, states=states, seed=1)
    torch.save(head.state_dict(), path)
    return str(path)


def both(model, path, **settings):
    """Tokens of `complete` and of the reference."""
    loaded = load_model(ModelSpec(model))
    llm = MARALLM(model=model, head=path, max_tokens=NUM_TOKENS, **settings)
    got = llm.complete(PROMPT, formatted=True).raw["token_ids"]
    ids = loaded.tokenizer(PROMPT).input_ids
    gate = GateParams(**{name: value for name, value in settings.items() if name in GateParams.model_fields})
    head, sampling = MARAHead.from_pretrained(path), SamplingParams(max_new_tokens=NUM_TOKENS)
    return got, recomputed_reply(loaded.model, ids, head, sampling, gate, loaded.eos_token_ids)


@torch.no_grad()
def typical_states(model, tokenizer):
    ids = torch.tensor([tokenizer("Words such as cat, tree, and sea; I like it when it rains.").input_ids])
    return model(ids, output_hidden_states=True).hidden_states[-1][0].clone()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2"])
@pytest.mark.parametrize("accept_rate", [0.95, 0.4, 0.0])
def test_a_tiny_model_under_a_published_actor(family, accept_rate, tmp_path):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    path = actor(tmp_path / "actor.pth", 32, accept_rate, typical_states(model, tokenizer))
    for fallback in ("first", "last", "best") if accept_rate == 0 else ("best",):  # then alone it is always taken
        got, want = both((model, tokenizer), path, fallback=fallback)
        assert got == want


@pytest.fixture(scope="module")
def real():
    """The embedded model; held open, so that it is loaded and measured once."""
    with MARAEngine("smollm2").load() as engine:
        yield engine.model


@pytest.mark.slow
@pytest.mark.parametrize("accept_rate", [0.95, 0.4])
def test_the_real_model_under_a_published_actor(accept_rate, tmp_path, real):
    path = actor(tmp_path / "actor.pth", 576, accept_rate, typical_states(real.model, real.tokenizer))
    got, want = both("smollm2", path)
    assert got == want


def test_strength_zero_is_generate(tmp_path, real):
    path = actor(tmp_path / "actor.pth", 576, 0.3, None)
    ids = torch.tensor([real.tokenizer(PROMPT).input_ids])
    want = real.model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0)[0, ids.shape[1] :].tolist()
    llm = MARALLM(model="smollm2", head=path, strength=0, max_tokens=8)
    assert llm.complete(PROMPT, formatted=True).raw["token_ids"] == want
