"""Losses on the scores of all candidates: their optima are what they say, in brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.training.learning.q_objectives import (
    centred,
    compliant,
    divergence_loss,
    mean_kl,
    next_rows,
    score_loss,
    soft_values,
    taken_log_ratios,
)


def rows(*probs):
    """Log-probabilities of positions with different numbers of candidates."""
    width = max(map(len, probs))
    padded = [[*row, *[0.0] * (width - len(row))] for row in probs]
    return torch.tensor(padded).log()


def minimised(loss, shape, steps=600):
    scores = torch.zeros(shape, requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(scores).backward()
        optimizer.step()
    return scores.detach()


def test_values_are_centred_under_the_base_model():
    log_probs = rows([0.5, 0.3, 0.2], [0.9, 0.1])
    values = centred(torch.tensor([[1.0, 2.0, 3.0], [4.0, 6.0, 99.0]]), log_probs)

    torch.testing.assert_close((log_probs.exp() * values).sum(-1), torch.zeros(2))
    torch.testing.assert_close(values[1], torch.tensor([-0.2, 1.8, 0.0]))


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.floats(0.01, 3))
def test_the_value_of_a_position_is_what_the_gate_gains_less_its_distance(values, strength):
    log_probs, candidates = rows([0.5, 0.3, 0.2], [1.0]), torch.tensor([values, [values[0], 77.0, 77.0]])
    gated = (log_probs[0] + strength * candidates[0]).softmax(-1)
    distance = float((gated * (gated.log() - log_probs[0])).sum())

    found = soft_values(candidates, log_probs, strength)

    assert float(found[0]) == pytest.approx(float((gated * candidates[0]).sum()) - distance / strength, abs=1e-4)
    assert float(found[1]) == pytest.approx(values[0], abs=1e-4), "a lone candidate is worth what it is worth"
    mean = soft_values(candidates, log_probs, 0.0)
    assert float(mean[0]) == pytest.approx(float((log_probs[0].exp() * candidates[0]).sum()), abs=1e-5)


def test_the_next_position_is_the_same_replys():
    assert next_rows(torch.tensor([0, 0, 0, 2, 5, 5])).tolist() == [1, 2, -1, -1, 5, -1]
    assert next_rows(torch.tensor([], dtype=torch.long)).tolist() == []


def test_the_regression_ends_at_its_targets_and_asks_nothing_where_there_is_no_candidate():
    log_probs = rows([0.9, 0.1], [1.0])
    targets = torch.tensor([[1.0, -2.0], [0.5, 77.0]])
    scores = minimised(lambda q: score_loss(q, targets, log_probs), (2, 2))
    torch.testing.assert_close(scores, torch.tensor([[1.0, -2.0], [0.5, 0.0]]), atol=0.02, rtol=0)


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.floats(0, 2))
def test_log_ratios_and_kl_are_those_of_the_weights(values, strength):
    probs, scores = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([values])
    gated = probs * (strength * scores).exp()
    gated = gated / gated.sum()

    ratios = [float(taken_log_ratios(scores, probs.log(), torch.tensor([k]), strength)) for k in range(3)]

    assert ratios == pytest.approx((gated / probs).log()[0].tolist(), abs=1e-5)
    want = float((gated * (gated / probs).log()).sum())
    assert float(mean_kl(scores, probs.log(), strength)) == pytest.approx(want, abs=1e-5)


def test_a_rule_ends_at_the_base_model_without_what_offends():
    log_probs = rows([0.6, 0.3, 0.1], [0.7, 0.3], [0.5, 0.5])
    offends = torch.tensor([[True, False, False], [False, False, False], [True, True, False]])

    scores = minimised(lambda q: divergence_loss(q, log_probs, compliant(log_probs, offends)), (3, 3), steps=1500)

    gated = (log_probs + scores).softmax(-1)
    torch.testing.assert_close(gated[0], torch.tensor([0.0, 0.75, 0.25]), atol=0.02, rtol=0)
    torch.testing.assert_close(gated[1], torch.tensor([0.7, 0.3, 0.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(gated[2], torch.tensor([0.5, 0.5, 0.0]), atol=0.02, rtol=0)
    assert float(divergence_loss(scores, log_probs, compliant(log_probs, offends))) < 0.01
