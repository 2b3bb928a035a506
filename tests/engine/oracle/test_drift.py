from __future__ import annotations

import pytest
import torch
from decoding import prompt

from mara_integrations.engine.oracle.drift import drift
from mara_integrations.errors import ConfigError
from mara_integrations.runtime import MARAEngine
from mara_integrations.testing import tiny_model, tiny_tokenizer


def test_a_model_does_not_drift_from_itself():
    found = drift(tiny_model(), tiny_model(), prompt(8), [1, 2, 3])
    assert (found.num_tokens, found.states, found.log_probs, found.same_best) == (3, 0, 0, 1)


def test_rounded_weights_drift_by_how_much_they_are_rounded():
    exact, ids, reply = tiny_model(), prompt(8), [1, 2, 3, 4]
    seen = []
    for scale in (256, 16):
        rounded = tiny_model()
        with torch.no_grad():
            for weight in rounded.parameters():
                weight.copy_((weight * scale).round() / scale)
        seen.append(drift(rounded, exact, ids, reply))
    assert 0 < seen[0].states < seen[1].states and 0 < seen[0].log_probs < seen[1].log_probs


def test_engines_are_compared_on_a_reply():
    model = tiny_model()
    one, other = (MARAEngine((model, tiny_tokenizer()), max_new_tokens=4) for _ in range(2))
    assert one.compare(other, "hi").states == 0


def test_engines_of_different_models_are_not_compared():
    one, other = (MARAEngine((tiny_model(seed=seed), tiny_tokenizer())) for seed in (0, 1))
    with pytest.raises(ConfigError, match="different models"):
        one.compare(other, "hi")
