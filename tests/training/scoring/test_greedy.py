"""Greedy requests follow a head as far as replies keep perplexity and variety, by a lower strength or a lower top-p."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.request import Request
from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.q import QHead
from mara_integrations.messages import Conversation, Message
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.progress import Reporter
from mara_integrations.runtime import MARAEngine
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import limited_prompts
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.identity import Identity
from mara_integrations.training.plan import make_plan
from mara_integrations.training.rollouts.positions import Positions, all_scores
from mara_integrations.training.rollouts.replies import sample_replies
from mara_integrations.training.run import start
from mara_integrations.training.scoring import greedy
from mara_integrations.training.scoring.greedy import (
    GreedySettings,
    greedy_choices,
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

    found, _ = share_within_losses(losses_at)

    assert len(tried) <= 3
    assert losses_at(found)[0] == pytest.approx(1.0, abs=0.1), "the larger of both"


@given(seed=st.integers(0, 1000))
def test_what_few_replies_tell_by_chance_is_averaged_over_the_trials(seed):
    noise = random.Random(seed)

    def losses_at(share):
        return [(share / 0.6) ** 2.8 * noise.uniform(0.8, 1.25) for _ in range(2)]

    assert 0.5 <= share_within_losses(losses_at)[0] <= 0.72


def test_a_share_is_at_most_1():
    losses = iter([(1.2, 0.0), (0.01, 0.0), (0.01, 0.0)])
    share, is_kept = share_within_losses(lambda _: next(losses))
    assert share <= 1.0 and is_kept


def test_a_head_that_costs_nothing_keeps_all():
    assert share_within_losses(lambda _: (-0.3, 0.9)) == (1.0, True)


def test_a_loss_that_no_trial_bounds_is_said():
    share, is_kept = share_within_losses(lambda _: (0.0, 2.0))
    assert not is_kept and 0 < share < 1.0


class _Run:
    """What of a run is needed to set greedy requests; keeps what it is told."""

    def __init__(self, budget):
        self.config = SimpleNamespace(kl_budget=budget)
        self.backend = SimpleNamespace(output_embeddings=None)
        self.lines, self.events = [], []
        self.say = self.lines.append

    def new_head(self):
        return QHead(HeadConfig(form="q", hidden_size=16))

    def log(self, event, **values):
        self.events.append((event, values))


@pytest.fixture
def greedily_set(monkeypatch):
    """Set a head, given losses by strength and top-p, and what it gains by the second of two candidates.

    The base model is sure of the first one in one of two positions, and not in the other.
    """
    log_probs = torch.tensor([[0.9, 0.1], [0.6, 0.4]]).log()
    first, second = torch.zeros(2, dtype=torch.long), torch.arange(2)
    positions = Positions(torch.zeros(2, 16), torch.tensor([[5, 6]] * 2), log_probs, first, first, second, 2)
    monkeypatch.setattr(greedy, "generate_replies", lambda _run, _stage, _prompts, _n, _seed, head, **_: head.config)
    monkeypatch.setattr(greedy, "quality_ratios", lambda _, config: (config.greedy_strength, config.greedy_top_p))
    monkeypatch.setattr(greedy.Positions, "of", lambda _: positions)

    def settings(where_sure, where_not, losses, budget=None):
        run, head = _Run(budget), QHead(HeadConfig(form="q", hidden_size=16))
        monkeypatch.setattr(greedy, "all_scores", lambda *_: torch.tensor([[0.0, where_sure], [0.0, where_not]]))
        monkeypatch.setattr(greedy, "quality_losses", lambda strength, top_p, _: losses(strength, top_p))
        hold_greedy_quality(run, head, [], 0)
        return head.config, run

    return settings


def _losses(strength, top_p):
    return (2.0 * (strength * top_p / 0.95) ** 3, 0.0)


def test_a_head_that_gains_where_the_model_is_not_sure_gets_a_lower_top_p(greedily_set):
    config, run = greedily_set(0.0, 0.45, _losses)

    assert config.greedy_strength == 1.0
    assert config.greedy_top_p == pytest.approx(0.95 * 0.5 ** (1 / 3), abs=0.02)
    assert any("strength 1.00 and top-p 0.7" in line for line in run.lines)
    assert [event for event, _ in run.events] == ["greedy quality"] * 3, "full strength is tried once"


def test_a_head_that_gains_where_the_model_is_sure_gets_a_lower_strength(greedily_set):
    config, _ = greedily_set(6.0, 0.45, _losses)

    assert config.greedy_strength == pytest.approx(0.5 ** (1 / 3), abs=0.02)
    assert config.greedy_top_p == 0.95


def test_a_head_whose_greedy_replies_lose_little_is_left_as_it_is(greedily_set):
    config, run = greedily_set(6.0, 0.45, lambda *_: (0.5, -0.2))

    assert (config.greedy_strength, config.greedy_top_p) == (1.0, 0.95)
    assert len(run.events) == 1


def test_replies_that_lose_too_much_at_every_trial_are_told(greedily_set):
    _, run = greedily_set(6.0, 0.45, lambda *_: (2.0, 0.0))
    assert "lost more than they may" in run.lines[-1]


def test_a_budget_that_is_named_is_all_that_bounds(greedily_set):
    config, run = greedily_set(6.0, 0.45, _losses, budget=0.3)
    assert (config.greedy_strength, config.greedy_top_p, run.lines) == (1.0, None, [])


@pytest.mark.parametrize("settings", [(1.0, 0.95), (0.3, 0.95), (1.0, 0.5), (1.0, 0.05), (0.5, 0.7)])
def test_choices_are_those_that_the_engine_takes(settings):
    model = load_model(ModelSpec((tiny_model(), tiny_tokenizer())))
    backend, (strength, top_p) = make_backend(model.model), settings
    decoder, head = Decoder(backend), random_head(32, "q", seed=1)
    prompts = [Conversation((Message("user", "hello"[: i + 1]),)) for i in range(4)]
    sampling = SamplingParams(max_new_tokens=12, temperature=0.0, top_p=1.0)
    replies = sample_replies(
        model, decoder, prompts, sampling=sampling, head=head, gate=GateParams(strength=1e-9), keep_positions=True
    )
    positions = Positions.of(replies)
    scores = head.config.scale * all_scores(head, positions, backend.output_embeddings)
    floor = torch.ones(len(positions), 1, dtype=torch.long)

    columns = greedy_choices(positions.log_probs, scores, GreedySettings(strength, top_p), floor)

    chosen = positions.token_ids.gather(1, columns[:, None])[:, 0]
    for row in range(0, len(positions), 5):
        reply, place = replies[int(positions.replies[row])], int(positions.places[row])
        prompt_ids = model.encoder.encode(prompts[reply.prompt_index])
        request = Request(
            [*prompt_ids, *reply.token_ids[:place]],
            sampling.updated(max_new_tokens=1, top_p=top_p),
            GateParams(strength=strength),
            head=head,
        )
        assert decoder.run([request])[0].token_ids == [int(chosen[row])]


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
