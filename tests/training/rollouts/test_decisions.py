"""Decisions: replies taken apart agree with what wrote them, with the base model's probabilities, and with bounds."""

from __future__ import annotations

import itertools

import pytest
import torch

from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.candidates import rank_candidates
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.gate import gated_log_probs
from mara_integrations.messages import Message
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer
from mara_integrations.training.learning.objectives import decision_log_probs
from mara_integrations.training.rollouts.decisions import Decisions, decisions_of, read_decisions
from mara_integrations.training.rollouts.replies import GivenReply, sample_replies

SAMPLING = SamplingParams(max_new_tokens=8, temperature=1.0, top_k=12, top_p=0.9)
WIDE = SamplingParams(max_new_tokens=8, temperature=1.0, top_k=150, top_p=0.8)  # any text has candidates among them


@pytest.fixture(scope="module")
def model():
    return load_model(ModelSpec((tiny_model(), tiny_tokenizer())))


@pytest.fixture(scope="module")
def backend(model):
    return make_backend(model.model)


@pytest.fixture(scope="module")
def sampled(model, backend):
    prompts = [(Message("user", text),) for text in ("a", "and longer", "b?")]
    head = random_head(32, "residual")
    return prompts, sample_replies(
        model, Decoder(backend), prompts, sampling=SAMPLING, replies_per_prompt=4, head=head, keep_positions=True
    )


def likelihood(model, prompt, reply_ids, sampling):
    """Log-probability of each token under the filtered base model, from plain forwards; None outside the candidates."""
    prompt_ids = model.encoder.encode(prompt)
    with torch.inference_mode():
        logits = model.model(torch.tensor([[*prompt_ids, *reply_ids]])).logits[0, len(prompt_ids) - 1 : -1]
    settings = (sampling.top_k, sampling.top_p, 1.0, 1)
    top_k, top_p, temperature, least = ([value] * len(reply_ids) for value in settings)
    found = rank_candidates(logits, top_k=top_k, top_p=top_p, temperature=temperature, min_candidates=least)
    live = torch.arange(found.token_ids.shape[1]) < found.counts[:, None]
    log_probs = gated_log_probs(found.hazard_logits, live)
    ranks = [row[:k].index(t) if t in row[:k] else None for row, k, t in zip(
        found.token_ids.tolist(), found.counts.tolist(), reply_ids, strict=True
    )]  # fmt: skip
    return [None if rank is None else float(log_probs[t, rank]) for t, rank in enumerate(ranks)]


def per_token(decisions, length):
    """Base log-probability of each token, summed over its decisions."""
    gaps = decision_log_probs(decisions.hazard_logits, decisions.accepted)
    return gaps.new_zeros(length).index_add(0, decisions.tokens, gaps).tolist()


def test_decisions_taken_have_the_base_models_probability(model, sampled):
    prompts, replies = sampled
    decisions = decisions_of(replies)
    assert int(decisions.counts.sum()) == len(decisions.states) > 50 and len(decisions) == 12
    for i, reply in enumerate(replies):
        one = decisions.take(torch.tensor([i]))
        want = likelihood(model, prompts[reply.prompt_index], list(reply.token_ids), SAMPLING)
        assert per_token(one, len(reply.token_ids)) == pytest.approx(want, abs=1e-3)


def test_reading_a_text_finds_the_decisions_that_write_it(model, backend):
    text = "it is 7!"
    reply_ids = model.tokenizer(text).input_ids
    want = likelihood(model, (Message("user", "a"),), reply_ids, WIDE)
    assert None in want and any(w is not None for w in want), "both cases occur"
    given = [GivenReply(0, (Message("user", "a"),), text)]
    decisions = read_decisions(model, backend, given, sampling=WIDE, max_competitors=99)
    got = per_token(decisions, len(reply_ids))
    for t, (token, log_prob) in enumerate(zip(reply_ids, want, strict=True)):
        if log_prob is not None:
            assert got[t] == pytest.approx(log_prob, abs=1e-3)
        else:
            own = decisions.tokens == t
            assert decisions.accepted[own].tolist() == [True], "decided on against all others"
            prompt_ids = model.encoder.encode((Message("user", "a"),))
            logits = model.model(torch.tensor([[*prompt_ids, *reply_ids[:t]]])).logits[0, -1]
            assert got[t] == pytest.approx(float(logits.detach().log_softmax(-1)[token]), abs=1e-3)


def test_states_do_not_depend_on_what_else_is_read(model, backend):
    texts = [
        GivenReply(0, (Message("user", "a"),), "one"),
        GivenReply(0, (Message("user", "a"),), "another"),
        GivenReply(1, (Message("user", "b"),), "x"),
    ]
    together = read_decisions(model, backend, texts, sampling=WIDE, max_competitors=3)
    alone = [read_decisions(model, backend, [text], sampling=WIDE, max_competitors=3) for text in texts]
    for i, one in enumerate(alone):
        same = together.take(torch.tensor([i]))
        assert same.tokens.tolist() == one.tokens.tolist() and same.accepted.tolist() == one.accepted.tolist()
        torch.testing.assert_close(same.states, one.states, rtol=1e-2, atol=1e-2)
    assert backend._cache.num_open == 0


def test_competitors_are_the_best_ones_and_bounded(model, backend):
    texts = [GivenReply(0, (Message("user", "a"),), "it is 7!")]
    bounds = [read_decisions(model, backend, texts, sampling=WIDE, max_competitors=n) for n in (0, 2, 99)]
    assert bool(bounds[0].accepted.all()), "the tokens of the text alone"
    assert [len(each.states) for each in bounds] == sorted({len(each.states) for each in bounds})
    for few, more in itertools.pairwise(bounds):
        for t in range(8):
            rejected = [each.hazard_logits[(each.tokens == t) & ~each.accepted].tolist() for each in (few, more)]
            assert rejected[1][: len(rejected[0])] == pytest.approx(rejected[0], abs=1e-3)
            assert len(rejected[0]) <= 2


def test_taking_and_joining_keep_replies_whole():
    rows, counts = torch.arange(6), torch.tensor([2, 0, 3, 1])
    decisions = Decisions(rows[:, None].half(), rows.float(), rows % 2 == 0, rows, counts)
    taken = decisions.take(torch.tensor([2, 0, 1]))
    assert taken.hazard_logits.tolist() == [2, 3, 4, 0, 1] and taken.replies.tolist() == [0, 0, 0, 1, 1]
    joined = Decisions.join([decisions.take(torch.tensor([i])) for i in range(4)])
    assert joined.states.equal(decisions.states) and joined.counts.equal(decisions.counts)
