"""The gate's laws: brute-force sums, agreement of greedy and sampled rules with the distribution, the paper's rule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.engine.gate import (
    Verdict,
    accept_logit,
    check_strength,
    decide,
    gated_log_probs,
    kl_to_base,
    selection_rule,
    tail_values,
    weighted_log_probs,
)
from mara_integrations.errors import ConfigError
from mara_integrations.sampling import GateParams

logits = st.lists(st.floats(-8, 8), min_size=1, max_size=6)


def brute_force(z):
    """Sum over all outcomes of independent coins, the last one forced to accept."""
    probs = [0.0] * len(z)
    for coins in itertools.product([0, 1], repeat=len(z) - 1):
        weight = math.prod(1 / (1 + math.exp(-x if c else x)) for x, c in zip(z, coins, strict=False))
        probs[(*coins, 1).index(1)] += weight
    return probs


@given(logits)
def test_the_distribution_is_that_of_independent_coins(z):
    live = torch.ones(1, len(z), dtype=torch.bool)
    torch.testing.assert_close(
        gated_log_probs(torch.tensor([z]), live).exp()[0], torch.tensor(brute_force(z)), rtol=1e-4, atol=1e-5
    )


@given(logits)
def test_greedy_takes_the_most_probable_and_stops_when_no_later_one_can_win(z):
    probs = brute_force(z)
    verdict = decide(z, len(z), "greedy", "first", 0.0)
    assert probs[verdict.taken] == pytest.approx(max(probs), abs=1e-9)
    shown = z[: verdict.num_visited]
    assert decide(shown, len(z), "greedy", "first", 0.0) == verdict, "what was not visited does not matter"
    if verdict.num_visited > 1:
        assert decide(shown[:-1], len(z), "greedy", "first", 0.0) is None


@given(logits)
def test_sampling_inverts_the_distribution(z):
    probs, steps = brute_force(z), 2000
    counts = [0] * len(z)
    for i in range(steps):
        counts[decide(z, len(z), "sample", "first", (i + 0.5) / steps).taken] += 1
    assert counts == pytest.approx([p * steps for p in probs], abs=2.0)


def test_sampling_asks_for_more_until_its_random_number_is_covered():
    assert decide([0.0], 3, "sample", "first", 0.6) is None
    assert decide([0.0, 0.0], 3, "sample", "first", 0.6).taken == 1
    assert decide([-40.0, -40.0, -40.0], 3, "sample", "first", 0.999).taken == 2, "the last is forced"


@pytest.mark.parametrize(("fallback", "taken"), [("first", 0), ("last", 2), ("best", 1)])
def test_the_papers_rule_takes_the_first_accepted_else_falls_back(fallback, taken):
    assert decide([-1.0, 2.0], 3, "first", fallback, 0.0) == Verdict(1, 2)
    assert decide([-1.0, -0.5], 3, "first", fallback, 0.0) is None
    assert decide([-1.0, -0.5, -2.0], 3, "first", fallback, 0.0) == Verdict(taken, 3, accepted=False)
    assert decide([0.0, -1.0], 2, "first", "last", 0.0).taken == 1, "a tie of the two classes is a rejection"


@given(st.lists(st.floats(-6, 6), min_size=2, max_size=6), st.floats(0, 3))
def test_kl_is_zero_at_strength_zero_and_positive_else(hazards, strength):
    live = torch.ones(1, len(hazards), dtype=torch.bool)
    h = torch.tensor([hazards])
    z = accept_logit("residual", torch.linspace(-1, 1, len(hazards))[None], h, strength)
    kl = float(kl_to_base(z, h, live))
    p, q = brute_force(z[0].tolist()), brute_force(hazards)
    assert kl == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 1e-12), abs=1e-3)
    assert kl == 0 if strength == 0 else kl >= -1e-6


def test_padding_columns_change_nothing():
    z, live = torch.tensor([[0.3, -0.2, 9.9]]), torch.tensor([[True, True, False]])
    torch.testing.assert_close(gated_log_probs(z, live)[:, :2], gated_log_probs(z[:, :2], live[:, :2]))


def test_auto_selection_follows_form_and_temperature():
    assert selection_rule("auto", "paper", 0.8) == "first"
    assert [selection_rule("auto", form, t) for form in ("residual", None) for t in (0.0, 0.8)] == [
        "greedy",
        "sample",
    ] * 2
    assert selection_rule("greedy", "paper", 0.8) == "greedy"


def test_a_paper_head_has_no_dial():
    with pytest.raises(ConfigError, match=r"strength=0\.5 is not allowed"):
        check_strength("paper", GateParams(strength=0.5))
    check_strength("value", GateParams(strength=0.5))


# --- scores of all candidates at once


@st.composite
def scored_candidates(draw):
    """Two rows of candidates, the second one shorter: base accept logits, scores, live columns."""
    rows = draw(st.lists(st.tuples(st.floats(-8, 8), st.floats(-5, 5)), min_size=1, max_size=6))
    other = draw(st.lists(st.tuples(st.floats(-8, 8), st.floats(-5, 5)), min_size=len(rows), max_size=len(rows)))
    count = draw(st.integers(1, len(rows)))
    hazard_logits, scores = torch.tensor([rows, other], dtype=torch.float64).unbind(-1)
    live = torch.arange(len(rows)) < torch.tensor([[len(rows)], [count]])
    return hazard_logits, scores, live


@given(scored_candidates(), st.floats(0, 3))
def test_weights_and_sequential_decisions_are_one_law(candidates, strength):
    hazard_logits, scores, live = candidates
    log_probs = gated_log_probs(hazard_logits, live)

    weighted = weighted_log_probs(log_probs, scores, strength, live)
    z = hazard_logits + strength * scores - tail_values(log_probs, scores, strength, live)

    torch.testing.assert_close(gated_log_probs(z, live).exp(), weighted.exp(), rtol=1e-6, atol=1e-9)


@given(scored_candidates())
def test_at_strength_0_or_with_equal_scores_the_gate_is_the_base_model(candidates):
    hazard_logits, scores, live = candidates
    log_probs = gated_log_probs(hazard_logits, live)

    assert not tail_values(log_probs, scores, 0.0, live).any(), "exactly"
    assert not tail_values(log_probs, torch.zeros_like(scores), 2.0, live).any(), "exactly"
    same = weighted_log_probs(log_probs, torch.ones_like(scores), 2.0, live)
    torch.testing.assert_close(same, log_probs)


@given(scored_candidates(), st.floats(0, 3), st.floats(0, 1, exclude_max=True))
def test_greedy_is_the_largest_weight_and_a_draw_runs_through_the_weights_in_order(candidates, strength, uniform):
    hazard_logits, scores, live = candidates
    log_probs = gated_log_probs(hazard_logits, live)
    weights = weighted_log_probs(log_probs, scores, strength, live).exp()
    z = hazard_logits + strength * scores - tail_values(log_probs, scores, strength, live)

    for row, count in enumerate(live.sum(-1).tolist()):
        known, total = z[row, :count].tolist(), weights[row].cumsum(-1).tolist()
        greedy = decide(known, count, "greedy", "first", uniform)
        assert float(weights[row, greedy.taken]) == pytest.approx(float(weights[row].max()), rel=1e-6)
        taken = decide(known, count, "sample", "first", uniform).taken
        assert taken == count - 1 or total[taken] > uniform - 1e-9
        assert taken == 0 or total[taken - 1] <= uniform + 1e-9
