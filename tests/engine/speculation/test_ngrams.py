"""Drafts save forwards where text repeats itself, and change no token."""

from __future__ import annotations

import pytest
import torch
from decoding import mixed_requests, prompt, reference, references
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.engine.backends.fused import FusedBackend
from mara_integrations.engine.backends.packed import PackedBackend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.request import Constraint, Request
from mara_integrations.engine.scheduler import Scheduler
from mara_integrations.engine.speculation.ngrams import NgramTable
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import ScriptedBackend, random_head, tiny_model


class Parrot(Scheduler):
    """Drafts as much as it may, whatever it has seen."""

    def num_drafted(self, sequence, right):
        return 5


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(0, 2), st.integers(0, 6))
def test_a_guess_is_what_followed_the_latest_earlier_place_that_reads_the_same(tokens, first, length):
    guess = NgramTable(tokens).propose([first], lambda right: length)
    text = [*tokens, first]
    want = []
    for size in (1, 2, 3):  # the longer match wins
        ends = [i for i in range(size, len(tokens)) if tokens[i - size : i] == text[len(text) - size :]]
        want = tokens[ends[-1] :][:length] if ends and len(text) >= size else want
    assert guess == want


def test_how_often_guesses_are_right_is_learnt_by_the_length_of_the_match():
    drafts, asked = NgramTable([1, 2, 3, 4, 5, 9, 1, 2, 3]), []

    def length(right):
        asked.append(right)
        return 2

    for _ in range(30):
        assert drafts.propose([], length) == [4, 5]
        drafts.observe(0, 2)
    assert asked == sorted(asked, reverse=True) and asked[-1] < 0.1
    assert drafts.propose([9], length) == [1, 2] and asked[-1] == 0.2, "a match of one token is another matter"
    drafts.observe(2, 2)
    assert drafts.propose([9], length) and asked[-1] > 0.3


@pytest.mark.parametrize("kind", [FusedBackend, PackedBackend])
def test_every_rule_head_and_setting_gives_the_reference_tokens(kind):
    model = tiny_model(vocab_size=12)  # small, so that texts repeat themselves
    requests = [
        Request([t % 12 for t in r.prompt_ids] * 2, r.sampling.updated(max_new_tokens=24), r.gate, r.head)
        for r in mixed_requests(model, count=6)
    ]
    scheduler = Parrot(max_live=4, prefill_chunk=6)
    done = Decoder(kind(model), scheduler).run(requests)
    assert [s.token_ids for s in done] == references(model, requests)
    assert sum(s.stats.rejected for s in done) > 8


@pytest.mark.parametrize("selection", ["first", "greedy", "sample"])
@pytest.mark.parametrize("form", [None, "residual", "value"])
def test_sampled_copies_are_exact_too(form, selection):
    model = tiny_model(vocab_size=8)
    head = random_head(32, form, seed=3) if form else None
    for seed in range(2):
        sampling = SamplingParams(max_new_tokens=24, temperature=0.7, seed=seed)
        request = Request(prompt(16, seed, 8), sampling, GateParams(selection=selection), head)
        reply = Decoder(FusedBackend(model), Parrot()).run([request])[0].token_ids
        assert reply == reference(model, request.prompt_ids, head, sampling, request.gate)


CIRCLE = 10


def _next_in_circle(tokens):
    return [9.0 if t == (tokens[-1] + 1) % CIRCLE else 0.0 for t in range(CIRCLE)]


@pytest.mark.parametrize("head", [None, random_head(CIRCLE + 1, accept_rate=1.0)])
def test_repeated_text_takes_few_forwards(head):
    backend = ScriptedBackend(_next_in_circle, CIRCLE, can_retract=True)
    sampling = SamplingParams(max_new_tokens=40, min_candidates=2 if head else 1)
    done = Decoder(backend).run([Request([*range(CIRCLE)] * 2, sampling, head=head)])[0]
    assert done.token_ids == [i % CIRCLE for i in range(40)] and backend.open_rows == 0
    assert len(backend.fed) <= 12


def test_a_reply_ends_inside_a_draft():
    backend = ScriptedBackend(_next_in_circle, CIRCLE, can_retract=True)
    ids, sampling = [*range(CIRCLE)] * 2, SamplingParams(max_new_tokens=40)
    done = Decoder(backend).run([Request(ids, sampling, eos_token_ids=frozenset([7]))])[0]
    assert done.token_ids == [*range(8)] and done.finish_reason == "stop"


def test_kept_states_are_those_of_a_plain_forward_with_drafts():
    model = tiny_model(vocab_size=8)
    for head in (None, random_head(32, accept_rate=0.7), random_head(32, "value")):
        request = Request(prompt(16, 0, 8), SamplingParams(max_new_tokens=16), head=head, keep_states=True)
        done = Decoder(FusedBackend(model), Parrot()).run([request])[0]
        with torch.inference_mode():
            whole = torch.tensor([[*request.prompt_ids, *done.token_ids]])
            want = model(whole, output_hidden_states=True).hidden_states[-1][0, 15:]
        torch.testing.assert_close(torch.stack(done.states), want, rtol=1e-3, atol=1e-3)


class Counting(Constraint):
    """A grammar of three tokens that may come after the last one, and of one in some places."""

    def __init__(self):
        self.taken = []

    def _allowed(self):
        last = self.taken[-1] if self.taken else 0
        return [(last + 1) % 8] if last % 3 == 2 else [(last + step) % 8 for step in (1, 2, 5)]

    def mask(self, logits):
        allowed = logits[self._allowed()].clone()
        logits.fill_(-torch.inf)
        logits[self._allowed()] = allowed

    def accept(self, token_id):
        assert token_id in self._allowed(), "a token was taken before those in front of it were"
        self.taken.append(token_id)

    def certain(self):
        return self._allowed() if len(self._allowed()) == 1 else []


@pytest.mark.parametrize("form", [None, "paper", "residual", "value"])
def test_a_grammar_is_kept_to_in_drafts_too(form, monkeypatch):
    model, kept = tiny_model(vocab_size=8), []
    head = random_head(32, form, accept_rate=0.7, seed=3) if form else None
    monkeypatch.setattr(NgramTable, "observe", lambda self, num_kept, num_proposed: kept.append(num_kept))
    for seed in range(4):
        sampling = SamplingParams(max_new_tokens=30, temperature=0.7, seed=seed)
        drafted, plain = (
            Decoder(FusedBackend(model), kind(feeds_all=True)).run(
                [Request(prompt(16, seed, 8), sampling, head=head, constraint=Counting(), keep_states=True)]
            )[0]
            for kind in (Parrot, Scheduler)
        )
        assert drafted.token_ids == plain.token_ids
        assert drafted.log_probs == pytest.approx(plain.log_probs, abs=1e-4)
        torch.testing.assert_close(torch.stack(drafted.states), torch.stack(plain.states), rtol=1e-3, atol=1e-3)
        assert len(drafted.states) == 31, "of the prompt's last token and of each of the reply"
    assert sum(kept) > 0, "some drafts were right"
