"""Losses on the scores of all candidates: their optima are what they say, in brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.training.learning.q_objectives import (
    candidate_advantages,
    centred,
    compliance_loss,
    mean_kl,
    score_loss,
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


def test_the_token_taken_counts_by_its_return_and_the_others_by_gain_and_what_follows():
    log_probs = rows([0.5, 0.5])
    got = candidate_advantages(
        gains=torch.tensor([[9.0, 1.0]]), follow=torch.tensor([[9.0, 2.0]]), taken=torch.tensor([0]),
        returns=torch.tensor([7.0]), log_probs=log_probs,
    )  # fmt: skip
    torch.testing.assert_close(got, torch.tensor([[2.0, -2.0]]))  # 7 against 3


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

    scores = minimised(lambda q: compliance_loss(q, log_probs, offends), (3, 3), steps=1500)

    gated = (log_probs + scores).softmax(-1)
    torch.testing.assert_close(gated[0], torch.tensor([0.0, 0.75, 0.25]), atol=0.02, rtol=0)
    torch.testing.assert_close(gated[1], torch.tensor([0.7, 0.3, 0.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(gated[2], torch.tensor([0.5, 0.5, 0.0]), atol=0.02, rtol=0)
    assert float(compliance_loss(scores, log_probs, offends)) < 0.01
