"""Schedules change time and never tokens; widths follow costs and accept rates; nobody waits for a long prompt."""

from __future__ import annotations

import random

import pytest
import torch
from decoding import mixed_requests, prompt, references
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.engine.backends.fused import FusedBackend
from mara_integrations.engine.backends.packed import PackedBackend
from mara_integrations.engine.backends.serial import SerialBackend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.gate import Verdict
from mara_integrations.engine.request import Request
from mara_integrations.engine.scheduler import Scheduler
from mara_integrations.engine.speculation.cost import WIDTHS, CostCurve, best_draft, best_width, measure
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import ScriptedBackend, tiny_model

FLAT = CostCurve.flat_to(8)


class Erratic(Scheduler):
    """Leaves everything it may decide to chance."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        super().__init__(max_live=self.random.randint(1, 6), prefill_chunk=self.random.randint(1, 20))

    def plan(self):
        self.random.shuffle(self.live)
        plan = [(s, self.random.randint(1, 9) if s.is_prefilling else len(s.pending)) for s in self.live]
        return plan[: self.random.randint(1, len(plan))] if plan else []

    def width(self, sequence):
        return self.random.randint(1, 12)

    def num_drafted(self, sequence, right):
        return self.random.randint(0, 4)


@pytest.mark.parametrize("kind", [FusedBackend, PackedBackend])
def test_no_schedule_changes_a_token(kind):
    model = tiny_model(vocab_size=12)  # small, so that drafts are found
    requests = [
        Request([t % 12 for t in r.prompt_ids], r.sampling.updated(max_new_tokens=12), r.gate, r.head)
        for r in mixed_requests(model)
    ]
    want = references(model, requests)
    for seed in range(8):
        done = Decoder(kind(model), Erratic(seed)).run(requests)
        assert [s.token_ids for s in done] == want, f"schedule {seed}"


@given(st.integers(1, 12), st.floats(0.0, 0.95), st.floats(0.0, 0.95), st.integers(1, 40))
def test_the_best_width_is_no_worse_than_any_other_first_step(rows, first, later, left):
    def expected(width, left, first):
        cost, rejected = FLAT(rows * width) / rows, (1 - first) * (1 - later) ** (width - 1)
        if width == left:
            return cost
        return cost + rejected * expected(best_width(FLAT, rows, left - width, later, later), left - width, later)

    best = best_width(FLAT, rows, left, first, later)
    widths = {min(width, left) for width in (*WIDTHS, left)}
    assert best in widths and expected(best, left, first) <= min(expected(w, left, first) for w in widths) + 1e-9


def test_wide_alone_and_narrow_in_a_batch():
    assert best_width(FLAT, 1, 20, 0.95, 0.5) <= 2, "firsts are mostly taken"
    assert best_width(FLAT, 1, 20, 0.4, 0.4) >= 4 > best_width(FLAT, 16, 20, 0.4, 0.4) == 1
    assert best_width(CostCurve.flat_to(200), 1, 40, 0.4, 0.2) >= 32, "where width is nearly free"


def test_drafts_are_long_where_they_hold_and_none_where_they_cost_more_than_they_bring():
    steep = CostCurve(((1, 1.0), (2, 1.8), (32, 4.0)))  # two tokens cost nearly twice one, as without packed weights
    certain = {"num_left": 1, "first": 1.0, "later": 0.0}
    assert best_draft(FLAT, 1, **certain, right=0.9) >= 7 > best_draft(FLAT, 1, **certain, right=0.3) >= 1
    assert best_draft(steep, 1, **certain, right=0.3) == 0 < best_draft(steep, 1, **certain, right=0.95)
    assert best_draft(FLAT, 16, **certain, right=0.3) == 0, "in a batch each token costs"
    assert best_draft(FLAT, 1, 20, first=0.1, later=0.4, right=0.9) == 0 < best_draft(FLAT, 1, 20, 0.9, 0.4, right=0.9)


def test_a_curve_is_straight_between_its_points_and_goes_on_after_them():
    curve = CostCurve(((1, 1.0), (5, 2.0), (9, 4.0)))
    assert [curve(n) for n in (1, 3, 5, 7, 9, 11)] == [1.0, 1.5, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("kind", [FusedBackend, PackedBackend, SerialBackend])
def test_a_measured_curve_rises_from_one(kind):
    backend = kind(tiny_model())
    curve = measure(backend, FLAT)
    costs = [curve(n) for n in (1, 2, 4, 8, 16, 32, 100, 1000)]
    assert costs[0] == 1.0 and costs == sorted(costs) and costs[-1] > costs[-2]
    with torch.inference_mode():
        assert backend.open() >= 0, "its row was closed"


def test_a_long_prompt_is_read_in_parts_beside_those_that_decode():
    backend = ScriptedBackend(lambda tokens: [1.0] * 5, vocab_size=5)
    decoder = Decoder(backend, Scheduler(prefill_chunk=16))
    decoder.submit(Request([1], SamplingParams(max_new_tokens=30)))
    decoder.step()
    for seed in range(3):
        decoder.submit(Request([t % 5 for t in prompt(20, seed)], SamplingParams(max_new_tokens=1)))
    steps = [decoder.step() for _ in range(20)]
    assert any(steps) and all(sum(len(s.token_ids) for s in fed if len(s.token_ids) > 1) <= 16 for fed in backend.fed)
    for fed in backend.fed[1:16]:
        assert any(segment.row == 0 for segment in fed), "the first request is in every forward"


def test_accept_rates_are_learnt_by_rank():
    scheduler = Scheduler()
    for _ in range(100):
        scheduler.observe(Verdict(2, 3))
    assert scheduler.accept_rates[True] < 0.05 and 0.3 < scheduler.accept_rates[False] < 0.7
    for _ in range(200):
        scheduler.observe(Verdict(0, 1))
    assert scheduler.accept_rates[True] > 0.95
