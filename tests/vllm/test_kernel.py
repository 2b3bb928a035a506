"""The gate as a function of logits, states and stacked heads: each row is the distribution of the rule, written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mara_integrations.heads.compose import ComposedHead, q_parts
from mara_integrations.testing import random_head
from mara_integrations.vllm.kernel import gate_logits
from mara_integrations.vllm.tables import GatedRequest, HeadTables

WIDTH, VOCAB = 16, 90


def heads(count, seed=0, **config):
    return [random_head(WIDTH, "q", seed=seed + i, inner_sizes=(8, 4), **config) for i in range(count)]


def request(head, strength=1.0, top_k=12, top_p=0.9, min_candidates=1, temperature=1.0):
    return GatedRequest(head, strength, top_k, top_p, min_candidates, temperature)


def batch(rows, seed=0, spread=3.0, vocab_size=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab_size, generator=generator) * spread
    states = torch.randn(rows, WIDTH, generator=generator)
    return logits, states, torch.randn(vocab_size, WIDTH, generator=generator)


def gate(logits, states, embeddings, requests, tables=None):
    tables = tables or HeadTables(embeddings)
    layout = tables.layout(requests, logits.shape[1])
    return logits.clone() if layout is None else gate_logits(logits.clone(), states, layout)


def filtered(row, request):
    """What `generate(do_sample=True)` of transformers samples from."""
    least = request.min_candidates
    warpers = LogitsProcessorList(
        [
            TemperatureLogitsWarper(request.temperature),
            TopKLogitsWarper(request.top_k, min_tokens_to_keep=least),
            TopPLogitsWarper(request.top_p, min_tokens_to_keep=least),
        ]
    )
    return warpers(torch.empty(1, 0, dtype=torch.long), row[None])[0].softmax(-1)


def expected(row, state, embeddings, request):
    """p(c) exp(strength * q(c)) over the candidates, renormalised, head by head and candidate by candidate."""
    probs = filtered(row, request)
    q = torch.zeros(len(row))
    for head, factor in q_parts(request.head).items():
        q += factor * head.score(state.expand(len(row), -1), embeddings)
    weights = probs * (request.strength * q.double()).exp()
    return (weights / weights.sum()).float()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    picks=st.lists(st.integers(-1, 5), min_size=1, max_size=9),  # the head of each row; -1 for none
    top_k=st.integers(1, 40),
    top_p=st.floats(0.1, 0.99),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    min_candidates=st.integers(1, 3),
)
def test_every_row_is_the_distribution_of_its_own_request(seed, picks, top_k, top_p, temperature, min_candidates):
    logits, states, embeddings = batch(len(picks), seed)
    one, two, three = heads(3, seed)
    other_shape = random_head(WIDTH, "q", seed=seed, inner_sizes=(6, 5), scale=0.5)
    choices = [one, two, three, other_shape, ComposedHead({one: 0.5, other_shape: 2.0}), ComposedHead({two: 1, one: 1})]
    requests = [
        None if pick < 0 else request(choices[pick], 0.3 + 0.2 * pick, top_k, top_p, min_candidates, temperature)
        for pick in picks
    ]

    gated = gate(logits, states, embeddings, requests)

    for i, own in enumerate(requests):
        if own is None:
            assert torch.equal(gated[i], logits[i])
        else:
            probs = (gated[i] / own.temperature).softmax(-1)
            want = expected(logits[i], states[i], embeddings, own)
            if (filtered(logits[i], own) > 0).sum() != (probs > 0).sum():
                continue  # the sum of top-p is within rounding of its bound, where either is right
            torch.testing.assert_close(probs, want, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [40, 64 * 12, 64 * 40, 64 * 40 + 1])
def test_candidates_are_found_in_vocabularies_of_any_size(vocab_size):
    logits, states, embeddings = batch(5, vocab_size=vocab_size)
    own = request(heads(1)[0], top_p=0.999)
    for gated, row, state in zip(gate(logits, states, embeddings, [own] * 5), logits, states, strict=True):
        want = expected(row, state, embeddings, own)
        torch.testing.assert_close(gated.softmax(-1), want, rtol=2e-3, atol=1e-5)


def test_the_probability_of_all_candidates_together_stays():
    logits, states, embeddings = batch(3)
    own = request(heads(1)[0], temperature=0.7)
    gated = gate(logits, states, embeddings, [own] * 3)
    before = torch.where(gated.isfinite(), logits, -torch.inf)
    torch.testing.assert_close((gated / 0.7).logsumexp(-1), (before / 0.7).logsumexp(-1))


def test_tokens_that_are_masked_are_no_candidates_and_a_row_without_any_stays_masked():
    logits, states, embeddings = batch(2)
    best = int(logits[0].argmax())
    logits[0, best] = -torch.inf
    logits[1] = -torch.inf
    gated = gate(logits, states, embeddings, [request(heads(1)[0])] * 2)
    assert gated[0, best] == -torch.inf
    assert gated[0].isfinite().any()
    assert (gated[1] == -torch.inf).all()


def test_tokens_tied_with_the_last_that_top_k_keeps_are_candidates():
    logits, states, embeddings = batch(1)
    logits[0] = -5.0
    logits[0, [3, 5, 8]] = torch.tensor([2.0, 1.0, 1.0])
    gated = gate(logits, states, embeddings, [request(heads(1)[0], top_k=2, top_p=1.0)])
    assert gated[0].isfinite().nonzero()[:, 0].tolist() == [3, 5, 8]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_hold_a_part_of_the_vocabulary_each_add_their_scores(ranks):
    logits, states, embeddings = batch(4)
    requests = [request(head) for head in heads(2)] * 2
    parts = [embeddings[start : start + 30] for start in range(0, VOCAB, 30)][:ranks]
    if ranks == 2:
        parts[1] = embeddings[30:]
    firsts = [0, *torch.tensor([len(part) for part in parts]).cumsum(0).tolist()]
    seen = []
    for part, first in zip(parts, firsts, strict=False):  # what each rank would hand to the sum
        layout = HeadTables(part, first).layout(requests, VOCAB)
        gate_logits(logits.clone(), states, layout, lambda scores: seen.append(scores) or scores)
    layout = HeadTables(parts[0]).layout(requests, VOCAB)
    gated = gate_logits(logits.clone(), states, layout, lambda _: sum(seen))
    torch.testing.assert_close(gated, gate(logits, states, embeddings, requests))


def test_heads_come_and_go_and_idle_ones_make_room():
    logits, states, embeddings = batch(3)
    own = VOCAB * 4 * 4  # bytes of one table
    tables = HeadTables(embeddings, max_idle_bytes=2 * own)
    many = heads(8)
    for first in (0, 3, 1, 5, 0):
        requests = [request(head) for head in many[first : first + 3]]  # more than may be idle
        torch.testing.assert_close(
            gate(logits, states, embeddings, requests, tables), gate(logits, states, embeddings, requests)
        )


def test_half_precision_embeddings_change_scores_by_little():
    logits, states, embeddings = batch(4)
    own = [request(heads(1)[0])] * 4
    exact = gate(logits, states, embeddings, own).softmax(-1)
    half = gate(logits, states.half(), embeddings.half(), own).softmax(-1)
    torch.testing.assert_close(half, exact, atol=0.02, rtol=0.1)
