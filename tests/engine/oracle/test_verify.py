"""The contract of exactness: the reference's tokens, except where a decision was closer than the numbers can tell."""

from __future__ import annotations

import logging

import pytest
import torch

from mara_integrations import MARAEngine
from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.oracle.reference import decide_reference, generate_reference
from mara_integrations.engine.oracle.verify import verify
from mara_integrations.engine.request import Request
from mara_integrations.errors import ConfigError
from mara_integrations.replies.forms import ReplyForm
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer

FORMS = ("paper", "residual", "value", "q", None)


def prompt(seed):
    return torch.randint(1, 256, (6,), generator=torch.Generator().manual_seed(seed)).tolist()


def request(seed=0, form="paper", **sampling):
    head = random_head(32, form, accept_rate=0.4, seed=seed) if form else None
    sampling = {"max_new_tokens": 10, "top_k": 8, "seed": seed, **sampling}
    return Request(prompt(seed), SamplingParams(**sampling), GateParams(), head)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_the_contract(dtype):
    model = tiny_model().to(dtype)
    decoder = Decoder(make_backend(model))
    requests = [request(seed, FORMS[seed % 5], temperature=0.8 * (seed >= 5)) for seed in range(10)]

    verified = [verify(model, r, s.token_ids) for r, s in zip(requests, decoder.run(requests), strict=True)]

    assert all(v.holds for v in verified), [v.disagreement for v in verified if not v.holds]
    assert sum(v.disagreement is None for v in verified) > 3, "noise is the exception"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_wrong_token_is_no_noise_and_is_logged_as_a_warning(form, temperature, caplog):
    model, asked = tiny_model(), request(1, form, temperature=temperature)
    right = generate_reference(model, asked.prompt_ids, asked.head, asked.sampling, asked.gate)
    assert verify(model, asked, right).disagreement is None
    wrong = [*right[:3], (right[3] + 1) % 256, *right[4:]]

    with caplog.at_level(logging.INFO, "mara_integrations"):
        verified = verify(model, asked, wrong)

    assert not verified.holds
    disagreement = verified.disagreement
    assert disagreement.position == 3 and disagreement.token_ids == (wrong[3], right[3])
    assert disagreement.gate_margin > disagreement.gate_bound > 0
    assert disagreement.logit_gap > disagreement.logit_bound > 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_an_accept_logit_next_to_zero_is_noise(caplog):
    model, asked = tiny_model(), request(2)
    position = decide_reference(model, asked.prompt_ids, asked.head, asked.sampling, asked.gate, 0.0)
    asked.head.output_linear.bias[1] += 1e-5 - position.accept_logits[0]  # the first is just accepted
    reference = generate_reference(model, asked.prompt_ids, asked.head, asked.sampling, asked.gate)

    with caplog.at_level(logging.INFO, "mara_integrations"):
        verified = verify(model, asked, [position.candidates[1], *reference[1:]])

    assert verified.holds and verified.disagreement.is_noise
    assert verified.disagreement.gate_margin == pytest.approx(1e-5, abs=1e-5)
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_two_tokens_of_one_logit_are_noise():
    model, asked = tiny_model(tie_word_embeddings=False), request(3, None)
    first, second = decide_reference(model, asked.prompt_ids, None, asked.sampling, asked.gate, 0.0).candidates[:2]
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[second] = weight[first]
    reference = generate_reference(model, asked.prompt_ids, None, asked.sampling, asked.gate)

    verified = verify(model, asked, [second if reference[0] == first else first, *reference[1:]])

    assert verified.holds and verified.disagreement.logit_gap < 1e-6


def test_the_engine_verifies_itself_whatever_stop_strings_say():
    engine = MARAEngine((tiny_model(), tiny_tokenizer()), random_head(32, "value"), max_new_tokens=8, temperature=0.7)
    verified = engine.verify("hi", stop=["a", "e", "i", "o", "u", " "])
    assert verified.holds and verified.token_ids == verified.reference_ids and len(verified.token_ids) == 8
    with pytest.raises(ConfigError, match="no tools, schemas or forbidden words"):
        engine.verify("hi", form=ReplyForm.of_call({"response_format": {"type": "json_object"}}))
