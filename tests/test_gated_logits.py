"""`GatedLogits`: the gate of Q-heads as a function of states and logits, in a loop of the user's own."""

from __future__ import annotations

import pytest
import torch

from mara_integrations.engine.oracle.reference import decide_reference, generate_reference
from mara_integrations.errors import ConfigError, HeadError, ShapeError
from mara_integrations.gated_logits import GatedLogits
from mara_integrations.heads.compose import ComposedHead
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import random_head, tiny_model


def prompt(length, seed=0):
    return torch.randint(1, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def seen(model, token_ids):
    output = model(torch.tensor([token_ids]), output_hidden_states=True)
    return output.hidden_states[-1][:, -1], output.logits[:, -1]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_a_greedy_loop_gives_the_tokens_of_the_reference(family):
    model, head = tiny_model(family), random_head(32, "q", top_k=8, scale=4.0)
    gate, tokens = GatedLogits(model, head), prompt(7)

    for _ in range(8):
        tokens.append(int(gate(*seen(model, tokens)).argmax()))

    assert tokens[7:] == generate_reference(model, prompt(7), head, SamplingParams(max_new_tokens=8, top_k=8))
    assert tokens[7:] != generate_reference(model, prompt(7), None, SamplingParams(max_new_tokens=8, top_k=8))


@torch.no_grad()
def test_every_row_is_the_distribution_of_the_gate():
    model, one, two = tiny_model(), random_head(32, "q", scale=0.4), random_head(32, "q", seed=1)
    prompts = [prompt(6, seed) for seed in range(3)]
    states, logits = map(torch.cat, zip(*(seen(model, ids) for ids in prompts), strict=True))
    weights = {one: 1.0, two: 0.5}
    gate = GatedLogits(model, weights, strength=0.7, temperature=0.8, top_k=6, top_p=0.9)

    probs = gate(states, logits).exp()

    sampling = SamplingParams(top_k=6, top_p=0.9, temperature=0.8)
    for row, ids in zip(probs, prompts, strict=True):
        args = (ComposedHead(weights), sampling, GateParams(strength=0.7, selection="sample"), 0.5)
        position = decide_reference(model, ids, *args)
        gated = [p * torch.tensor(q).exp() for p, q in zip(position.probs, position.scores, strict=True)]
        want = torch.zeros(256)
        want[position.candidates] = torch.tensor(gated) / sum(gated)
        torch.testing.assert_close(row, want, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_strength_0_is_the_filtered_base_model_and_masked_tokens_stay_out():
    model = tiny_model()
    hidden, logits = seen(model, prompt(5))
    logits[0, logits[0].argmax()] = -torch.inf
    gate = GatedLogits(model, random_head(32, "q"), strength=0.0, top_k=4, top_p=1.0)

    probs = gate(hidden, logits)[0].exp()

    best = logits[0].topk(4)
    torch.testing.assert_close(probs[best.indices], best.values.softmax(-1))
    assert int((probs > 0).sum()) == 4


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"head": random_head(32, "residual")}, ConfigError, "takes heads of the 'q' form"),
        ({"head": None}, ConfigError, "at least one"),
        ({"head": random_head(48, "q")}, HeadError, "hidden size 48"),
        ({"head": {random_head(32, "q"): 0.0}}, ConfigError, "^head='0 x q head of None' can't gate"),
        ({"head": random_head(32, "q"), "temperature": 0.0}, ConfigError, "temperature=0.0"),
        ({"head": random_head(32, "q"), "temperature": "hot"}, ConfigError, "temperature='hot'"),
        ({"head": random_head(32, "q"), "top_p": 1.5}, ConfigError, "top_p=1.5"),
        ({"head": random_head(32, "q"), "strength": -1.0}, ConfigError, "strength=-1.0"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_it_cannot_do_is_refused_at_once(arguments, error, said):
    with pytest.raises(error, match=said):
        GatedLogits(tiny_model(), **arguments)


@pytest.mark.parametrize(("hidden", "logits"), [((2, 3, 32), (2, 3, 256)), ((32,), (256,)), ((1, 32), (2, 256))])
def test_states_and_logits_that_are_no_rows_are_refused(hidden, logits):
    gate = GatedLogits(tiny_model(), random_head(32, "q"))

    with pytest.raises(ShapeError, match="of each sequence the last position alone"):
        gate(torch.zeros(hidden), torch.zeros(logits))
