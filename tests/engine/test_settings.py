"""What holds for a request: the call before the object, the object before the head, else what is built in."""

from __future__ import annotations

import pytest

from mara_integrations.engine.settings import overlay, resolve_settings
from mara_integrations.errors import ConfigError
from mara_integrations.heads.compose import ComposedHead
from mara_integrations.replies.forms import ReplyForm
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import random_head

HEAD = random_head(32, "residual", top_k=7, top_p=0.5, min_candidates=2, system_prompt="of the head")


def resolve(call=None, defaults=None):
    return resolve_settings(call or {}, defaults or {}, lambda source: source)


def test_with_nothing_said_the_base_model_answers_as_built_in():
    resolved = resolve()

    assert resolved.head is None and resolved.system_prompt is None and not resolved.raw
    assert resolved.sampling == SamplingParams() and resolved.gate == GateParams()
    assert resolved.form == ReplyForm()


@pytest.mark.parametrize(
    ("name", "of_call", "of_object", "of_head"),
    [("top_k", 5, 6, 7), ("top_p", 0.3, 0.4, 0.5), ("min_candidates", 4, 3, 2)],
)
def test_candidate_settings_are_the_calls_then_the_objects_then_the_heads(name, of_call, of_object, of_head):
    def value(call, defaults):
        return getattr(resolve({"head": HEAD, **call}, defaults).sampling, name)

    assert value({name: of_call}, {name: of_object}) == of_call
    assert value({}, {name: of_object}) == of_object
    assert value({name: None}, {name: of_object}) == of_object
    assert value({}, {}) == of_head
    assert value({"head": None}, {}) == getattr(SamplingParams(), name)


@pytest.mark.parametrize(
    ("name", "of_call", "of_object"),
    [
        ("temperature", 0.5, 0.7),
        ("max_new_tokens", 3, 4),
        ("stop", ("a",), ("b",)),
        ("seed", 1, 2),
        ("strength", 0.5, 2.0),
        ("selection", "sample", "greedy"),
        ("trace", True, False),
    ],
)
def test_other_settings_are_the_calls_then_the_objects(name, of_call, of_object):
    def value(call, defaults):
        resolved = resolve(call, defaults)
        return getattr(resolved.gate if name in GateParams.model_fields else resolved.sampling, name)

    assert value({name: of_call}, {name: of_object}) == of_call
    assert value({}, {name: of_object}) == of_object


def test_the_head_of_a_call_goes_first_and_none_is_the_base_model():
    other = random_head(32)

    assert resolve({"head": other}, {"head": HEAD}).head is other
    assert resolve({}, {"head": HEAD}).head is HEAD
    assert resolve({"head": None}, {"head": HEAD}).head is None


def test_a_system_prompt_is_the_calls_then_the_objects_then_the_heads_and_can_be_turned_off():
    def prompt(call, **defaults):
        return resolve(call, {"head": HEAD, **defaults}).system_prompt

    assert prompt({"system_prompt": "of the call"}, system_prompt="of the object") == "of the call"
    assert prompt({}, system_prompt="of the object") == "of the object"
    assert prompt({}) == prompt({}, system_prompt=None) == "of the head"
    assert prompt({"system_prompt": ""}) == prompt({}, system_prompt="") == ""
    assert prompt({"head": None}) is None


def test_strength_0_and_no_head_are_one_request():
    off, without = resolve({"head": HEAD, "strength": 0}), resolve({"head": None})

    assert off.sampling == without.sampling and off.system_prompt is without.system_prompt is None


def test_greedy_requests_that_name_no_strength_get_the_one_the_head_was_trained_to():
    head, other = (random_head(32, "q", greedy_strength=value) for value in (0.8, 0.6))

    def strength(call, defaults=None):
        return resolve({"head": head, **call}, defaults).gate.strength

    assert strength({"temperature": 0.0}) == 0.8
    assert strength({"temperature": 0.7}) == 1.0
    assert strength({"temperature": 0.0, "strength": 1.0}) == 1.0
    assert strength({"temperature": 0.0}, {"strength": 2.0}) == 2.0
    assert strength({"temperature": 0.0, "strength": 0.0}) == 0.0
    assert strength({"temperature": 0.0, "head": ComposedHead({head: 1.0, other: 0.5})}) == 0.6


def test_greedy_requests_that_name_no_strength_have_at_most_the_top_p_of_the_head():
    head, other = random_head(32, "q", greedy_top_p=0.5), random_head(32, "q", greedy_top_p=0.4)

    def top_p(call, defaults=None):
        return resolve({"head": head, **call}, defaults).sampling.top_p

    assert top_p({"temperature": 0.0}) == 0.5
    assert top_p({"temperature": 0.0, "top_p": 1.0}) == 0.5, "clients send it whatever they mean"
    assert top_p({"temperature": 0.0, "top_p": 0.3}) == top_p({"temperature": 0.0}, {"top_p": 0.3}) == 0.3
    assert top_p({"temperature": 0.7}) == top_p({"temperature": 0.0, "strength": 1.0}) == 0.95
    assert top_p({"temperature": 0.0, "strength": 1.0, "top_p": 0.8}) == 0.8
    assert top_p({"temperature": 0.0, "head": ComposedHead({head: 1.0, other: 0.5})}) == 0.4
    assert top_p({"temperature": 0.0, "head": random_head(32, "q")}) == 0.95


def test_a_seed_can_be_taken_back():
    assert resolve({}, {"seed": 3}).sampling.seed == 3
    assert resolve({"seed": None}, {"seed": 3}).sampling.seed is None


def test_max_tokens_and_max_new_tokens_are_one_setting():
    assert resolve({"max_tokens": 3}, {"max_new_tokens": 9}).sampling.max_new_tokens == 3
    assert resolve({"max_new_tokens": 3}, {"max_tokens": 9}).sampling.max_new_tokens == 3
    assert resolve({"max_new_tokens": 3, "max_tokens": 3}).sampling.max_new_tokens == 3
    with pytest.raises(ConfigError, match="max_tokens=3 and max_new_tokens=4 contradict each other"):
        resolve({"max_new_tokens": 4, "max_tokens": 3})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temprature": 1}, r"temprature=1 is not a setting \(hint: did you mean temperature\?"),
        ({"hed": None}, "did you mean head"),
        ({"zzz": 1}, r"settings are fallback, form, head"),
        ({"top_p": 0}, "top_p=0 is not allowed"),
        ({"strength": -1}, "strength=-1 is not allowed"),
        ({"raw": "yes"}, "raw='yes' is not allowed"),
        ({"system_prompt": 3}, "system_prompt=3 is not allowed"),
        ({"n": 2}, "n=2 is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty=0.5 is not supported"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_wherever_it_is_given(settings, said):
    for call, defaults in ((settings, {}), ({}, settings)):
        with pytest.raises(ConfigError, match=said):
            resolve(call, defaults)


def test_settings_of_other_engines_are_taken_at_values_that_change_nothing():
    neutral = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": None, "logit_bias": {}, "repetition_penalty": 1.0}

    assert overlay(neutral, {}) == {}
