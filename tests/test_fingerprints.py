"""Models are told apart by their sizes and weights, whatever they are called."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from mara_integrations.fingerprints import fingerprint, same_model
from mara_integrations.models.int8 import quantize
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer


def changed(model, relative, seed=0):
    """A copy whose matrices differ by this much, relative to their size."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            if weight.dim() == 2:
                noise = torch.randn(weight.shape, generator=generator)
                weight += relative * weight.std() * noise
    return other


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma"])
def test_a_model_is_itself_in_every_number_format(family):
    model = tiny_model(family)
    own = fingerprint(model)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert same_model(own, fingerprint(copy.deepcopy(model).to(dtype))) is True
    assert len(own) < 500


def test_other_weights_are_another_model():
    assert same_model(fingerprint(tiny_model(seed=0)), fingerprint(tiny_model(seed=1))) is False


def test_other_sizes_are_another_model():
    assert same_model(fingerprint(tiny_model()), fingerprint(tiny_model(num_hidden_layers=3))) is False


def test_a_fine_tuned_model_is_another_one():
    model = tiny_model()
    assert same_model(fingerprint(model), fingerprint(changed(model, 0.03))) is False


@pytest.mark.parametrize("relative", [0.01, 0.1, 0.2])
def test_a_quantised_copy_is_the_same_model(relative):
    model = tiny_model()
    rounded = fingerprint(changed(model, relative), is_quantised=True)
    assert same_model(fingerprint(model), rounded) is same_model(rounded, fingerprint(model)) is True
    assert same_model(fingerprint(tiny_model(seed=1)), rounded) is False


def test_packed_weights_leave_the_normalisation_to_tell():
    model = tiny_model()
    packed = copy.deepcopy(model)
    quantize(packed)
    assert same_model(fingerprint(model), fingerprint(packed, is_quantised=True)) is True


def test_weights_that_are_not_here_have_no_fingerprint():
    with torch.device("meta"):
        assert fingerprint(tiny_model()) is None


@pytest.mark.parametrize("text", [None, "", "x", "1:exact:a:b", "1:exact:a:!:", "1:exact:a:fw==:", "2:exact:a::"])
def test_what_is_no_fingerprint_tells_nothing(text):
    assert same_model(text, fingerprint(tiny_model())) is None


def test_a_head_knows_its_model_by_any_name(tmp_path, monkeypatch):
    """A folder, a copy of it, and the loaded object are one model: none is warned of, and another one is."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 0), ("b", 0), ("other", 1)):
        tiny_model(seed=seed).save_pretrained(name)
        tiny_tokenizer().save_pretrained(name)
    first = load_model(ModelSpec("a"))
    head = random_head(32, "residual", base_model="org/a", base_model_fingerprint=first.fingerprint)
    same = [
        first,
        load_model(ModelSpec("b")),
        load_model(ModelSpec("b", dtype="bfloat16")),
        load_model(ModelSpec((tiny_model(), tiny_tokenizer()))),
    ]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in same:
            head.check_fits(32, model.name, fingerprint=model.fingerprint)
    other = load_model(ModelSpec("other"))
    with pytest.warns(UserWarning, match="trained on 'org/a' and now judges 'other'"):
        head.check_fits(32, other.name, fingerprint=other.fingerprint)
