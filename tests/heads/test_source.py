"""What `head=` may name: one head, a folder, several with weights; and what it means before a model is loaded."""

from __future__ import annotations

import math

import pytest
import torch

from mara_integrations.errors import ConfigError, HeadError
from mara_integrations.heads.compose import ComposedHead
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.source import base_model_of, head_fingerprint, head_name, head_weights, place_heads
from mara_integrations.testing import random_head

CPU = torch.device("cpu")


def place(source, **settings):
    return place_heads(source, CPU, 16, "tiny", **settings)


@pytest.fixture
def one():
    return random_head(16, "residual", seed=1, base_model="tiny")


@pytest.fixture
def two():
    return random_head(16, "residual", seed=2, base_model="tiny")


def test_a_list_counts_and_a_mapping_weighs(one, two):
    assert head_weights(None) == {}
    assert head_weights("heads/a") == {"heads/a": 1.0}
    assert head_weights([one, "heads/a", one]) == {one: 2.0, "heads/a": 1.0}
    assert head_weights({one: 0.5, two: 2}) == {one: 0.5, two: 2}


@pytest.mark.parametrize("source", [3, [], {}, ["heads/a", 3], {3: 1.0}, True])
def test_what_names_no_head_is_refused_with_what_is_allowed(source):
    with pytest.raises(ConfigError, match="is not allowed") as error:
        head_weights(source)
    assert repr(source) in str(error.value) and "a Hub id" in error.value.hint


@pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan, "1"])
def test_weights_are_numbers_from_zero_up(weight):
    with pytest.raises(ConfigError, match="head 'heads/a' has the weight"):
        head_weights({"heads/a": weight})


def test_a_single_head_of_weight_one_is_itself_and_others_are_composed(one, two):
    assert place(one) is one and place([one]) is one and place({one: 1.0, two: 0}) is one
    composed = place({one: 0.5, two: 2.0})
    assert isinstance(composed, ComposedHead) and composed.parts == {one: 0.5, two: 2.0}
    assert place({one: 0.5}).parts == {one: 0.5}, "a weight other than one needs a factor"


def test_no_head_and_heads_of_weight_zero_are_the_base_model(one):
    assert place(None) is None and place({one: 0}) is None


def test_a_folder_named_twice_in_two_ways_is_one_head_of_both_weights(one, tmp_path):
    folder = one.save_pretrained(tmp_path / "one")
    (head,) = place({str(folder): 0.5, folder: 1.0}).parts.items()
    assert head[0].fingerprint == one.fingerprint and head[1] == 1.5


def test_a_head_that_does_not_fit_is_refused_by_its_name_whatever_its_weight(tmp_path):
    folder = str(random_head(24).save_pretrained(tmp_path / "wide"))
    for weight in (1.0, 0.0):
        with pytest.raises(HeadError, match=r"wide.*expects hidden size 24.*'tiny' has 16"):
            place({folder: weight})


def test_a_head_that_is_not_there_is_named(tmp_path):
    with pytest.raises(HeadError, match="nowhere"):
        place(str(tmp_path / "nowhere"))


def test_the_base_model_is_the_one_that_all_heads_record(one, two, tmp_path):
    assert base_model_of([one, str(two.save_pretrained(tmp_path / "two"))]) == "tiny"
    with pytest.raises(ConfigError, match="different models: 'tiny', 'other'"):
        base_model_of([one, random_head(16, base_model="other")])


def test_a_head_that_records_no_base_model_is_named(tmp_path):
    silent = random_head(16)
    with pytest.raises(ConfigError, match=r"^the head does not record the model"):
        base_model_of(silent)
    with pytest.raises(ConfigError, match=r"head '.*silent' does not record the model"):
        base_model_of(str(silent.save_pretrained(tmp_path / "silent")))


def test_names_tell_form_base_model_and_weight(one):
    assert head_name(None) is None
    assert head_name(["heads/a", "heads/b", "heads/b"]) == "heads/a + 2 x heads/b"
    assert head_name({one: 0.25}) == "0.25 x residual head of tiny"


def test_fingerprints_differ_where_replies_can(one, two, tmp_path):
    folder = str(one.save_pretrained(tmp_path / "one"))
    assert head_fingerprint(None) is None
    assert head_fingerprint(folder) == head_fingerprint(one), "a head is told by what it is, not by where it lies"
    louder = MARAHead.from_pretrained(folder)
    louder.config = louder.config.model_copy(update={"scale": 2.0})
    prints = [head_fingerprint(source) for source in (one, two, {one: 0.5}, [one, two], louder)]
    assert len(set(prints)) == len(prints)
