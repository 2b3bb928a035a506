"""Greedy requests follow a head as far as replies keep perplexity and variety, by a lower strength or a lower top-p."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.q import QHead
from mara_integrations.progress import Reporter
from mara_integrations.runtime import MARAEngine
from mara_integrations.testing import random_head
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import limited_prompts
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.identity import Identity
from mara_integrations.training.plan import make_plan
from mara_integrations.training.run import start
from mara_integrations.training.scoring import greedy
from mara_integrations.training.scoring.greedy import (
    hold_greedy_quality,
    share_within_losses,
)

VOWELS = "tests/reward_for_tests.py:vowels"


@given(share=st.floats(0.5, 0.99), power=st.floats(1.5, 4.0))
def test_losses_that_are_powers_of_the_share_are_met_in_few_trials(share, power):
    tried = []

    def losses_at(setting):
        tried.append(setting)
        return (setting / share) ** power, 0.5 * (setting / share) ** power

    found = share_within_losses(losses_at)

    assert len(tried) <= 3
    assert losses_at(found.share)[0] == pytest.approx(1.0, abs=0.1) and found.limit == 0, "the larger of both"


@given(seed=st.integers(0, 1000))
def test_what_few_replies_tell_by_chance_is_averaged_over_the_trials(seed):
    noise = random.Random(seed)

    def losses_at(share):
        return [(share / 0.6) ** 2.8 * noise.uniform(0.8, 1.25) for _ in range(2)]

    assert 0.5 <= share_within_losses(losses_at).share <= 0.72


def test_a_share_is_at_most_1():
    losses = iter([(1.2, 0.0), (0.01, 0.0), (0.01, 0.0)])
    found = share_within_losses(lambda _: next(losses))
    assert found.share <= 1.0 and found.is_seen


def test_a_head_that_costs_nothing_keeps_all():
    assert share_within_losses(lambda _: (-0.3, 0.9)) == (1.0, None, True)


def test_a_loss_that_no_trial_bounds_is_said():
    found = share_within_losses(lambda _: (0.0, 2.0))
    assert not found.is_seen and 0 < found.share < 1.0 and found.limit == 1


class _Run:
    """Stands in for a training run, and records its messages and events."""

    def __init__(self, budget):
        self.config = SimpleNamespace(kl_budget=budget)
        self.lines, self.events = [], []
        self.say = self.lines.append

    def new_head(self):
        return QHead(HeadConfig(form="q", hidden_size=16))

    def log(self, event, **values):
        self.events.append((event, values))


@pytest.fixture
def greedily_set(monkeypatch):
    """Set a head, given the losses of perplexity and variety by strength and top-p."""
    monkeypatch.setattr(greedy, "generate_replies", lambda _run, _stage, _prompts, _n, _seed, head, **_: head.config)
    monkeypatch.setattr(greedy, "quality_ratios", lambda _, config: (config.greedy_strength, config.greedy_top_p))

    def settings(losses, budget=None):
        run, head = _Run(budget), QHead(HeadConfig(form="q", hidden_size=16))
        monkeypatch.setattr(greedy, "quality_losses", lambda strength, top_p, _: losses(strength, top_p))
        hold_greedy_quality(run, head, [], 0)
        return head.config, run

    return settings


def test_a_head_whose_greedy_replies_lose_fluency_gets_a_lower_strength(greedily_set):
    config, run = greedily_set(lambda strength, _: (2.0 * strength**3, 0.5))

    assert config.greedy_strength == pytest.approx(0.5 ** (1 / 3), abs=0.02)
    assert config.greedy_top_p == 0.95
    assert [event for event, _ in run.events] == ["greedy quality"] * 2


def test_a_head_whose_greedy_replies_lose_variety_gets_a_lower_top_p(greedily_set):
    config, run = greedily_set(
        lambda strength, top_p: (1.5 * (strength * top_p) ** 4, 2.0 * strength * (top_p / 0.95) ** 3)
    )

    assert config.greedy_strength == 1.0
    assert config.greedy_top_p == pytest.approx(0.95 * 0.5 ** (1 / 3), abs=0.02)
    assert any("strength 1.00 and top-p 0.7" in line for line in run.lines)
    assert [event for event, _ in run.events] == ["greedy quality"] * 3, "full strength is tried once"


def test_a_head_whose_greedy_replies_lose_little_is_left_as_it_is(greedily_set):
    config, run = greedily_set(lambda *_: (0.5, -0.2))

    assert (config.greedy_strength, config.greedy_top_p) == (1.0, 0.95)
    assert len(run.events) == 1


def test_replies_that_lose_too_much_at_every_trial_are_told(greedily_set):
    _, run = greedily_set(lambda *_: (2.0, 0.0))
    assert "lost more than they may" in run.lines[-1]


def test_a_budget_that_is_named_is_all_that_bounds(greedily_set):
    config, run = greedily_set(lambda *_: (2.0, 2.0), budget=0.3)
    assert (config.greedy_strength, config.greedy_top_p, run.lines) == (1.0, None, [])


def test_what_is_measured_is_what_greedy_requests_get(tmp_path, folder_model, prompts_file):
    config = TrainConfig.of(
        model=folder_model, data=prompts_file, output=tmp_path / "head", reward=VOWELS, max_reply_tokens=12
    )
    plan = make_plan(config)
    run = start(config, plan, Identity.of(config, plan), Reporter())
    prompts = limited_prompts(run, plan.held_out)
    head = random_head(32, "q", scale=2.0, greedy_strength=0.7, greedy_top_p=0.4, min_candidates=2)

    measured = generate_replies(run, "greedy", prompts, 1, 0, head, temperature=0.0)

    with MARAEngine(folder_model, head) as engine:
        asked = {"temperature": 0.0, "max_new_tokens": 12}
        got = engine.generate_batch(prompts, **asked)
        full = engine.generate_batch(prompts, **asked, strength=0.7)
    assert [list(reply.token_ids) for reply in measured] == [list(reply.token_ids) for reply in got]
    assert [reply.token_ids for reply in got] != [reply.token_ids for reply in full], "the top-p counts"
