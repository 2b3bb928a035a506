"""The paper's decoding procedure, which the benchmarks measure speed against, gives the reference's tokens."""

from __future__ import annotations

import sys
from pathlib import Path

from decoding import prompt

from mara_integrations.engine.oracle.reference import generate_reference
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import random_head, tiny_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from published_decoding import generate_published


def test_the_published_procedure_gives_the_reference_tokens():
    model, head = tiny_model(), random_head(32, accept_rate=0.3)
    want = generate_reference(model, prompt(8), head, SamplingParams(max_new_tokens=8))
    assert generate_published(model, head, prompt(8), 8) == want


def test_the_published_procedure_leaves_a_model_the_hooks_it_had():
    model, seen = tiny_model(), []
    hook = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    generate_published(model, random_head(32), prompt(8), 2)
    seen.clear()
    model(input_ids=model.dummy_inputs["input_ids"])
    assert seen == [1]
    hook.remove()
