"""How a request to vLLM is gated, by what it says and what its head brings; vLLM itself is not needed."""

from __future__ import annotations

import pytest
import torch

from mara_integrations.testing import random_head
from mara_integrations.vllm.requests import gated_request


@pytest.mark.parametrize(
    ("said", "temperature", "strength", "top_p"),
    [
        ({}, 0.0, 0.8, 0.4),
        ({"top_p": 1.0}, 0.0, 0.8, 0.4),
        ({"strength": 1.0}, 0.0, 1.0, 0.9),
        ({}, 0.7, 1.0, 0.9),
    ],
    ids=["greedy", "greedy, with all candidates", "greedy, with a strength", "sampled"],
)
def test_greedy_requests_get_what_the_head_brings_for_them(tmp_path, monkeypatch, said, temperature, strength, top_p):
    random_head(32, "q", top_p=0.9, greedy_strength=0.8, greedy_top_p=0.4).save_pretrained(tmp_path / "brand")
    monkeypatch.setenv("MARA_HEADS", str(tmp_path))

    found = gated_request({"mara": {"head": "brand", **said}}, temperature, torch.device("cpu"), {})

    assert (found.strength, found.top_p) == (strength, top_p)
