"""Several heads as one: their corrections add, their settings agree or are decided."""

from __future__ import annotations

import pytest

from mara_integrations.errors import ConfigError, HeadError
from mara_integrations.heads.compose import ComposedHead, afterstate_parts, q_parts, trained_settings
from mara_integrations.testing import random_head

WORDS = {"kind": "ready", "name": "forbidden-words", "arguments": {"words": ["x"]}}
JSON = {"kind": "ready", "name": "json", "arguments": {}}


def head(form="residual", seed=0, **config):
    return random_head(16, form, seed=seed, **config)


def test_a_part_counts_with_its_weight_and_its_calibrated_scale():
    one, two = head(scale=3.0, rewards=(WORDS,)), head("value", scale=0.5, rewards=(JSON,))
    composed = ComposedHead({one: 0.5, two: 2.0})
    assert composed.parts == {one: 1.5, two: 1.0}
    assert composed.config.rewards == (WORDS, JSON) and composed.config.hidden_size == 16


def test_heads_that_score_before_and_after_the_candidate_are_told_apart():
    q, residual = head("q", scale=2.0), head(scale=3.0)
    mixed = ComposedHead({q: 1.0, residual: 1.0})
    assert q_parts(mixed) == {q: 2.0} and afterstate_parts(mixed) == {residual: 3.0}
    assert mixed.config.form == "residual", "it needs its candidates fed"
    assert ComposedHead({q: 1.0, head("q", 1): 1.0}).config.form == "q"


def test_a_paper_head_has_nothing_to_add():
    with pytest.raises(ConfigError, match="'paper' head can be neither weighed nor composed"):
        ComposedHead({head(): 1.0, head("paper"): 1.0})


def test_heads_of_different_widths_do_not_add():
    with pytest.raises(HeadError, match="hidden sizes 16 and 24"):
        ComposedHead({head(): 1.0, random_head(24, "residual"): 1.0})


@pytest.mark.parametrize(
    ("name", "values"), [("top_k", (40, 20)), ("top_p", (0.9, 0.8)), ("system_prompt", ("Be brief.", "Be kind."))]
)
def test_settings_that_decide_what_is_judged_have_to_agree_or_be_given(name, values):
    one, two = (head(seed=seed, **{name: value}) for seed, value in enumerate(values))
    composed = ComposedHead({one: 1.0, two: 1.0})
    with pytest.raises(ConfigError, match=f"different {name}: ") as error:
        trained_settings(composed, ())
    assert f"{name}={values[0]!r}" in error.value.hint
    assert trained_settings(composed, {name})["min_candidates"] == 1
    assert trained_settings(one, ())[name] == values[0]


def test_the_head_that_needs_most_candidates_gets_them():
    composed = ComposedHead({head(): 1.0, head(seed=1, min_candidates=2): 1.0})
    assert trained_settings(composed, ())["min_candidates"] == 2


def test_a_head_without_a_system_prompt_takes_that_of_another():
    composed = ComposedHead({head(): 1.0, head(seed=1, system_prompt="Be brief."): 1.0})
    assert trained_settings(composed, ())["system_prompt"] == "Be brief."
    assert "system_prompt" not in trained_settings(head(), ())
