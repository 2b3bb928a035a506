"""Requests as vLLM takes them, without vLLM: the translation of settings, and what is refused before any work."""

from __future__ import annotations

import json

import pytest

from mara_integrations import MARALLM, ChatMARA
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.engine.request import Request
from mara_integrations.engine.vllm_requests import EngineGrammar, check_vllm_request, saved_heads, vllm_params
from mara_integrations.errors import ConfigError
from mara_integrations.heads.compose import ComposedHead
from mara_integrations.heads.head import MARAHead
from mara_integrations.runtime import MARAEngine
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import random_head

Q = random_head(32, "q")
RESIDUAL = random_head(32, "residual")
FOLDER = "no-such-folder"  # everything here is refused before it is looked for


def params(tmp_path, head=None, strength=1.0, **sampling):
    request = Request([5, 6], SamplingParams(**sampling), GateParams(strength=strength), head, frozenset({3, 1}))
    check_vllm_request(request)
    return vllm_params(request, tmp_path)


def test_a_request_without_a_head_is_vllms_own(tmp_path):
    found = params(tmp_path, temperature=0.7, top_k=5, top_p=0.9, max_new_tokens=9, seed=4)
    assert found == {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "max_tokens": 9,
        "seed": 4,
        "stop_token_ids": [1, 3],
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }
    assert not list(tmp_path.iterdir())


def test_a_head_goes_with_its_candidates_and_vllm_samples_from_what_it_leaves(tmp_path):
    found = params(tmp_path, Q, 0.5, temperature=0.7, top_k=5, top_p=0.9, min_candidates=2)
    assert not {"top_k", "top_p"} & found.keys()
    [name] = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    candidates = {"top_k": 5, "top_p": 0.9, "min_candidates": 2}
    assert found["extra_args"] == {"mara": {"head": {name: 1.0}, "strength": 0.5, **candidates}}
    assert MARAHead.from_pretrained(tmp_path / name).fingerprint == Q.fingerprint


def test_strength_0_is_the_same_request_as_no_head(tmp_path):
    assert params(tmp_path, Q, 0.0, temperature=0.7) == params(tmp_path, temperature=0.7)


def test_composed_heads_keep_their_weights_and_are_saved_once(tmp_path):
    scaled = random_head(32, "q", seed=1, scale=4.0)
    weights = saved_heads(ComposedHead({Q: 0.5, scaled: 2.0}), tmp_path)
    assert sorted(weights.values()) == [0.5, 2.0]
    assert saved_heads(scaled, tmp_path).keys() <= weights.keys()
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


def test_heads_that_differ_in_their_scale_alone_are_two(tmp_path):
    names = {name for scale in (1.0, 2.0) for name in saved_heads(random_head(32, "q", scale=scale), tmp_path)}
    assert len(names) == 2


def test_a_grammar_goes_to_vllm_as_it_is(tmp_path):
    tag = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": {}}}
    request = Request([5], constraint=EngineGrammar(tag), top_logprobs=3)
    check_vllm_request(request)
    found = vllm_params(request, tmp_path)
    assert json.loads(found["structural_tag"]) == tag and found["logprobs"] == 3


class Mask:
    def mask(self, logits):
        pass

    def accept(self, token_id):
        pass


REQUESTS = {
    "no tokens": (Request([]), "prompt is empty"),
    "an afterstate head": (Request([5], head=RESIDUAL), "'residual' form"),
    "a trace": (Request([5], gate=GateParams(trace=True)), "trace=True"),
    "a constraint": (Request([5], constraint=Mask()), "constraint in Python"),
    "states": (Request([5], keep_states=True), "hidden states"),
    "a temperature": (Request([5], SamplingParams(temperature=2.5)), "temperature=2.5"),
    "a floor of candidates without a head": (
        Request([5], SamplingParams(temperature=1.0, min_candidates=2)),
        "min_candidates=2",
    ),
}


@pytest.mark.parametrize(("request_", "said"), REQUESTS.values(), ids=REQUESTS)
def test_requests_that_can_not_run_are_refused(request_, said):
    with pytest.raises(ConfigError, match=said):
        check_vllm_request(request_)


REFUSED = {
    "an afterstate head": ({"head": RESIDUAL}, "'residual' form .* 'q' form"),
    "one of several heads": ({"head": {Q: 1.0, RESIDUAL: 1.0}}, "'residual' form"),
    "a trace": ({"trace": True}, "trace=True .*transformers"),
    "forbidden words": ({"never": ["refund"]}, "never=.*refund.*transformers"),
    "a selection": ({"selection": "first"}, "selection='first'"),
    "a temperature": ({"temperature": 2.5}, "temperature=2.5 .*at 2.0 at most"),
    "a fallback": ({"fallback": "best"}, "fallback='best'"),
    "our quantisation": ({"quantization": "int8"}, "quantization='int8'.*model_kwargs"),
    "memory": ({"limits": EngineLimits(kv_bytes=1 << 30)}, "kv_bytes=.*kv_cache_memory_bytes"),
    "speculation": ({"model_kwargs": {"speculative_config": {}}}, "speculative_config.*speculative decoding"),
    "a seed of the engine": ({"model_kwargs": {"seed": 1}}, "seed=1"),
    "a loaded model": ({"model": (object(), object())}, "loaded already"),
}


@pytest.mark.parametrize(("settings", "said"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("kind", [MARAEngine, ChatMARA, MARALLM])
def test_what_vllm_can_not_do_is_refused_when_the_object_is_made(kind, settings, said):
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        kind(**{"model": FOLDER, "engine": "vllm", **settings})


def test_neutral_settings_and_strength_0_are_let_through():
    MARAEngine(FOLDER, engine="vllm", never=[], trace=False, selection="auto", fallback="first")
    MARAEngine(FOLDER, RESIDUAL, engine="vllm", strength=0)
    MARAEngine(FOLDER, engine="vllm", limits=EngineLimits(max_live=8))


def test_a_call_is_refused_before_the_model_is_looked_for():
    engine = MARAEngine(FOLDER, engine="vllm")
    for settings in ({"trace": True}, {"never": "refund"}, {"head": RESIDUAL}):
        with pytest.raises(ConfigError, match="engine='vllm'"):
            engine.generate("hi", **settings)
        with pytest.raises(ConfigError, match="engine='vllm'"):
            engine.with_settings(**settings)
