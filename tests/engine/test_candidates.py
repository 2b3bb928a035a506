"""Candidates are the survivors of transformers' own filters, in order, with the base model's hazards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mara_integrations.engine.candidates import rank_candidates
from mara_integrations.engine.gate import gated_log_probs


def rank(logits, top_k=40, top_p=0.95, temperature=1.0, min_candidates=1):
    n = len(logits)
    return rank_candidates(
        logits, top_k=[top_k] * n, top_p=[top_p] * n, temperature=[temperature] * n, min_candidates=[min_candidates] * n
    )


def warped(row, top_k, top_p, temperature, min_candidates):
    """What `generate(do_sample=True)` samples from."""
    warpers = LogitsProcessorList(
        [TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k, min_tokens_to_keep=min_candidates)]
    )
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p, min_tokens_to_keep=min_candidates))
    return warpers(torch.empty(1, 0, dtype=torch.long), row[None].float())[0].softmax(-1)


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(1, 60),
    top_p=st.floats(0.05, 1.0),
    temperature=st.floats(0.2, 3.0),
    min_candidates=st.integers(1, 3),
    spread=st.sampled_from([0.3, 2.0, 8.0]),
)
@example(seed=0, top_k=1, top_p=0.9999999850988388, temperature=1.0, min_candidates=1, spread=8.0)  # 1 in float32
@example(seed=0, top_k=60, top_p=0.9999999850988388, temperature=0.2, min_candidates=1, spread=8.0)
def test_the_distribution_is_that_of_generate(seed, top_k, top_p, temperature, min_candidates, spread):
    logits = torch.randn(3, 120, generator=torch.Generator().manual_seed(seed)) * spread
    got = rank(logits, top_k, top_p, temperature, min_candidates)
    for i, row in enumerate(logits):
        want, n = warped(row, top_k, top_p, temperature, min_candidates), int(got.counts[i])
        assert set(got.token_ids[i, :n].tolist()) == set(want.nonzero()[:, 0].tolist())
        live = torch.arange(got.token_ids.shape[1])[None] < n
        probs = gated_log_probs(got.hazard_logits[i][None], live)[0, :n].exp()  # the hazards are the whole distribution
        torch.testing.assert_close(probs, want[got.token_ids[i, :n]], rtol=1e-3, atol=1e-5)
        assert (probs.diff() <= 1e-6).all(), "most probable first"


def test_log_probs_are_of_the_whole_vocabulary_at_temperature_one():
    logits = torch.randn(2, 50)
    got = rank(logits, temperature=0.5)
    torch.testing.assert_close(got.log_probs, logits.log_softmax(-1).gather(1, got.token_ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_by_token_id_and_a_tie_with_the_last_one_stays(dtype):
    logits = torch.zeros(1, 30, dtype=dtype)
    logits[0, [7, 3]] = 2.0
    got = rank(logits, top_k=5, top_p=1.0)
    assert got.token_ids[0].tolist() == [3, 7, *(i for i in range(30) if i not in (3, 7))]


def test_rows_have_settings_of_their_own():
    logits = torch.randn(1, 50).repeat(3, 1)
    got = rank_candidates(
        logits, top_k=[1, 5, 50], top_p=[1.0, 1.0, 1.0], temperature=[1.0, 1.0, 1.0], min_candidates=[1, 1, 1]
    )
    assert got.counts.tolist() == [1, 5, 50]


def test_min_candidates_keeps_a_runner_up_of_a_sure_thing():
    logits = torch.tensor([[20.0, 0.0, -1.0, -2.0]])
    assert rank(logits).counts.tolist() == [1]
    got = rank(logits, min_candidates=2)
    assert got.token_ids[0, :2].tolist() == [0, 1] and got.counts.tolist() == [2]


def test_a_sum_on_the_boundary_of_top_p_is_decided_as_transformers_decides_it():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log()[None]  # 0.75 is reached exactly by two
    want = warped(logits[0], 5, 0.75, 1.0, 1)
    assert rank(logits, 5, 0.75).counts.tolist() == [int((want > 0).sum())]
