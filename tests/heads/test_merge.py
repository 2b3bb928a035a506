"""Heads merged into one: the same scores as their sum, and what has none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mara_integrations.errors import ConfigError, HeadError, MaraError
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.merge import merge_heads
from mara_integrations.testing import random_head

WIDTH = 24


def head(seed: int, form: str = "residual", **config) -> MARAHead:
    """A head whose normalisation has a scale and a shift of its own."""
    made = random_head(WIDTH, form, seed=seed, **config)
    generator = torch.Generator().manual_seed(seed)
    made.ln.weight.copy_(torch.randn(WIDTH, generator=generator))
    made.ln.bias.copy_(torch.randn(WIDTH, generator=generator))
    return made


@given(
    weights=st.lists(st.floats(-3, 3).filter(lambda w: abs(w) > 0.01), min_size=2, max_size=4),
    form=st.sampled_from(["residual", "value", "q"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_a_merged_head_scores_every_state_as_the_weighted_sum(weights, form, seed):
    sizes = [(16, 4), (32, 8), (8, 8), (5, 3)]
    heads = [head(seed + i, form, inner_sizes=sizes[i], scale=0.5 + i) for i in range(len(weights))]
    states = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(seed)) * 5
    previous = states.roll(1, 0)

    merged = merge_heads(list(zip(heads, weights, strict=True)))

    parts = zip(heads, weights, strict=True)
    expected = sum(w * h.config.scale * h.score(states, previous).double() for h, w in parts)
    torch.testing.assert_close(merged.score(states, previous).double(), expected, rtol=1e-4, atol=1e-3)


def test_it_survives_its_folder_and_says_what_it_was_made_of(tmp_path):
    spec = {"kind": "ready", "name": "json", "arguments": {}}
    parts = [(head(0, base_model="m", rewards=(spec,)), 1.0), (head(1, base_model="m", min_candidates=2), 0.5)]
    merged = merge_heads(parts)
    merged.save_pretrained(tmp_path)
    config = MARAHead.from_pretrained(tmp_path).config
    assert (config.base_model, config.min_candidates, config.rewards, config.method) == ("m", 2, (spec,), "merge")
    assert config.training["merged"] == [{"weight": w, "head": part.fingerprint} for part, w in parts]


def test_candidate_settings_that_differ_have_to_be_said():
    parts = [(head(0, top_k=40), 1.0), (head(1, top_k=20), 1.0)]
    with pytest.raises(ConfigError, match="different top_k: 40 and 20"):
        merge_heads(parts)
    assert merge_heads(parts, top_k=20).config.top_k == 20


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([(head(0), 1.0)], "nothing to merge"),
        ([(head(0), 1.0), (head(1), 0.0)], "weight 0.0"),
        ([(head(0), 1.0), (head(1), float("nan"))], "weight nan"),
        ([(head(0), 1.0), (head(1, "value"), 1.0)], "different form can't be merged (residual, value)"),
        ([(head(0, "paper"), 1.0), (head(1, "paper"), 1.0)], "'paper' form can't be merged"),
        ([(head(0), 1.0), (random_head(8, "residual"), 1.0)], "different hidden_size can't be merged (24, 8)"),
        ([(head(0, base_model="o/a"), 1.0), (head(1, base_model="o/b"), 1.0)], "different base_model"),
    ],
)
def test_what_has_no_sum_is_refused_with_the_reason(parts, said):
    with pytest.raises(MaraError) as caught:
        merge_heads(parts)
    assert said in caught.value.message and isinstance(caught.value, ConfigError | HeadError)
