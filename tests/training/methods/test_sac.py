"""SAC: credit adds up, the buffer keeps what follows what, updates learn and resume, collapse is noticed."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mara_integrations.errors import ConfigError, OutputError
from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.head import MARAHead
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.learning.actor_critic import (
    DecisionStats,
    Learner,
    SACSettings,
    collapse,
    default_settings,
    policy,
)
from mara_integrations.training.learning.credit import postback_credit, prefix_credit, terminal_credit
from mara_integrations.training.learning.replay_buffer import ReplayBuffer, Transitions
from mara_integrations.training.rollouts.decisions import Decisions
from mara_integrations.training.run import train


def decisions(*replies):
    """Replies given as lists of (token, accepted)."""
    flat = [decision for reply in replies for decision in reply]
    counts = torch.tensor([len(reply) for reply in replies])
    tokens = torch.tensor([token for token, _ in flat], dtype=torch.long)
    accepted = torch.tensor([accepted for _, accepted in flat], dtype=torch.bool)
    return Decisions(torch.zeros(len(flat), 4).half(), torch.zeros(len(flat)), accepted, tokens, counts)


TWO = ([(0, False), (0, True), (1, True), (3, False), (3, True)], [], [(2, True)])


# --- credit ---


def test_terminal_credit_goes_to_last_decisions():
    assert terminal_credit(decisions(*TWO), [1.0, 5.0, -2.0]).tolist() == [0, 0, 0, 0, 1, -2]


def test_postback_discounts_once_an_accepted_token():
    got = postback_credit(decisions(*TWO), [1.0, 5.0, -2.0], 0.5)
    assert got.tolist() == [0.25, 0.25, 0.5, 1.0, 1.0, -2.0]


def test_prefix_credit_goes_to_the_decision_that_settled_the_token():
    rewards = [[0.0, 1.0, 3.0, 3.5, 7.0, 8.0], [9.0], [0.0, 0.0, 2.0, 1.0]]
    got = prefix_credit(decisions(*TWO), rewards)
    assert got.tolist() == [0.0, 1.0, 2.5, 0.0, 4.5, -1.0], "token 2 was no decision: its gain is that of token 1"


@given(st.lists(st.floats(-2, 2), min_size=6, max_size=6))
def test_prefix_credit_adds_up_to_the_reply(rewards):
    got = prefix_credit(decisions(TWO[0]), [rewards])
    assert float(got.sum()) == pytest.approx(rewards[-1] - rewards[0], abs=1e-5)


# --- the buffer ---


def episodes(first, lengths, hidden_size=3):
    count = sum(lengths)
    ends = torch.zeros(count, dtype=torch.bool)
    ends[torch.tensor(lengths).cumsum(0) - 1] = True
    rows = torch.arange(first, first + count, dtype=torch.float32)
    return Transitions(rows[:, None].expand(-1, hidden_size).half(), rows, rows.long() % 2 == 0, rows, ends)


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=8), st.integers(6, 20))
@settings(deadline=None)
def test_what_follows_a_transition_is_its_episodes_next_state(rounds, capacity):
    buffer, added, ends = ReplayBuffer(capacity, 3, None), 0, set()
    for lengths in rounds:
        batch = episodes(added, lengths)
        buffer.add(batch)
        ends |= {added + i for i, end in enumerate(batch.ends.tolist()) if end}
        added += len(batch)
    assert len(buffer) == min(added, capacity)
    batch = buffer.sample(200, torch.Generator().manual_seed(0), torch.device("cpu"))
    columns = (batch.rewards, batch.states[:, 0], batch.next_states[:, 0], batch.ends)
    for reward, state, after, end in zip(*(column.tolist() for column in columns), strict=True):
        assert reward == state and reward >= added - capacity, "only the newest are there"
        assert end == (reward in ends) and (end or after == state + 1)


def test_on_disk_it_is_the_same_buffer(tmp_path):
    memory = ReplayBuffer(50, 3, tmp_path / "unused")
    disk = ReplayBuffer(50, 3, tmp_path / "work" / "states", max_bytes=100)
    assert not (tmp_path / "unused").exists() and (tmp_path / "work" / "states").stat().st_size == 300
    for buffer in (memory, disk):
        buffer.add(episodes(0, [20, 15]))
        buffer.add(episodes(35, [30]))
    batches = [b.sample(64, torch.Generator().manual_seed(1), torch.device("cpu")) for b in (memory, disk)]
    assert batches[0].states.equal(batches[1].states) and batches[0].next_states.equal(batches[1].next_states)


def test_a_full_disk_says_so_before_the_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"no room for 0\.0 GB of hidden states .* No space left"):
        ReplayBuffer(50, 3, tmp_path / "states", max_bytes=100)
    assert not (tmp_path / "states").exists()


# --- updates ---


def planted(n=600):
    """Episodes of one decision: accepting is worth the sign of the first coordinate, rejecting nothing."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(n, 16, generator=generator)
    accepted = torch.rand(n, generator=generator) < 0.5
    rewards = torch.where(accepted, states[:, 0].sign(), 0.0)
    return Transitions(states.half(), torch.zeros(n), accepted, rewards, torch.ones(n, dtype=torch.bool))


def learner(preset, form="paper", seed=0):
    torch.manual_seed(seed)
    return Learner(MARAHead(HeadConfig(form=form, hidden_size=16, inner_sizes=(64, 16))), preset, seed)


def updated(learner, times, capacity=600):
    buffer = ReplayBuffer(capacity, 16, None)
    buffer.add(planted())
    return [learner.update(buffer.sample(64, learner.generator, learner.device)) for _ in range(times)]


@torch.no_grad()
def accepts(learner):
    """First coordinates of planted states, and the probability to accept each."""
    data = planted()
    return data.states[:, 0], policy(learner.actor, data.states.float(), data.hazard_logits)[:, 1].exp()


@pytest.mark.parametrize("form", ["paper", "residual"])
def test_it_learns_to_accept_what_pays(form):
    one = learner(SACSettings(learning_rate=3e-3, temperature=0.1, target_entropy=0.1), form)
    updated(one, 200)
    pays, accept = accepts(one)
    assert float(accept[pays > 0.3].mean()) > 0.8 > 0.2 > float(accept[pays < -0.3].mean())


def test_the_temperature_steers_the_entropy_to_its_target():
    rising = learner(SACSettings(learning_rate=3e-3, temperature=0.01))
    falling = learner(SACSettings(learning_rate=3e-3, temperature=1.0))
    few, many = updated(rising, 150), updated(falling, 150)
    assert few[-1]["alpha"] > 0.01 and many[-1]["alpha"] < 1.0
    fixed = learner(SACSettings(temperature=0.0, target_entropy=None))
    assert [figures["alpha"] for figures in updated(fixed, 3)] == [0.0, 0.0, 0.0]


def test_distance_from_the_base_model_costs():
    spread = []
    for weight in (0.0, 9.0):
        one = learner(SACSettings(learning_rate=3e-3, kl_weight=weight, temperature=0.0, target_entropy=None))
        updated(one, 100)
        spread.append(float((accepts(one)[1] - 0.5).abs().mean()))
    assert spread[1] < 0.15 < spread[0]


def test_targets_can_stand_still_for_some_updates():
    one = learner(SACSettings(tau=0.005, target_every=10))
    before = one.targets.first[0].weight.clone()
    updated(one, 9)
    assert one.targets.first[0].weight.equal(before)
    updated(one, 1)
    moved = one.targets.first[0].weight - before
    torch.testing.assert_close(moved, 0.005 * (one.critics.first[0].weight - before), rtol=1e-3, atol=1e-7)


def test_interrupted_and_resumed_is_uninterrupted():
    whole, half = learner(SACSettings()), learner(SACSettings())
    updated(whole, 12)
    updated(half, 5)
    resumed = learner(SACSettings(), seed=7)
    resumed.load_state_dict(half.state_dict())
    updated(resumed, 7)
    got, want = resumed.state_dict(), whole.state_dict()
    for name in ("actor", "critics", "targets"):
        assert all(a.equal(b) for a, b in zip(got[name].values(), want[name].values(), strict=True))
    assert whole.log_alpha.equal(resumed.log_alpha) and whole.num_updates == resumed.num_updates == 12


# --- the watchdog ---


def test_collapse_is_told_from_decisions():
    assert collapse(DecisionStats(0.5, 0.4, 0.1)) is None and collapse(DecisionStats(0.05, 0.1, 0.1)) is None
    assert "rejects everything" in collapse(DecisionStats(0.001, 0.004, 0.1))
    assert "accepts everything" in collapse(DecisionStats(0.999, 0.004, 0.1))
    assert "no longer numbers" in collapse(DecisionStats(math.nan, 0.1, 0.1))
    assert collapse(DecisionStats(0.55, 0.001, 0.1)) is None, "certain, but not of one answer"


# --- whole runs ---


@pytest.fixture
def files(tmp_path, folder_model, monkeypatch):
    """A model and prompts; few and small updates, and rounds of few replies."""

    def small(form, credit):
        return replace(default_settings(form, credit), batch_size=32, warmup=75, updates=1)

    monkeypatch.setattr("mara_integrations.training.methods.sac.default_settings", small)
    monkeypatch.setattr("mara_integrations.training.methods.sac._REPLIES_PER_ROUND", 16)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(20)))
    return tmp_path


def run(files, output="head", reporter=None, **values):
    defaults = {"max_replies": 32, "max_reply_tokens": 6, "inner_size": 32, "eval_prompts": 2, "method": "sac"}
    return train(
        TrainConfig.of(
            model=str(files / "tiny"), data=files / "prompts.jsonl", output=files / output,
            reward="tests/reward_for_tests.py:vowels", **defaults | values,
        ),
        reporter=reporter,
    )  # fmt: skip


def rounds(folder):
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "round"]


@pytest.mark.parametrize(("form", "credit"), [("residual", "prefix"), ("paper", "terminal"), ("residual", "postback")])
def test_a_head_is_trained_from_end_to_end(files, form, credit):
    result = run(files, form=form, credit=credit)
    assert result.head.config.form == form and result.head.config.method == "sac"
    assert not (files / "head" / ".run").exists()
    first, last = rounds(files / "head")
    assert (
        first["candidates_per_token"] > 1
        and last["alpha"] == pytest.approx(0.0 if form == "residual" else 0.2, rel=0.2)
        and last["kl_per_token"] >= 0
    )
    if form == "residual":
        assert first["kl_per_token"] == pytest.approx(0, abs=1e-5), "the first round is the base model's"


def test_interrupted_anywhere_it_goes_on_to_the_same_head(interrupting, files):
    whole = run(files, "whole", eval_prompts=0)
    for after in (8, 16, 25):
        with pytest.raises(KeyboardInterrupt):
            run(files, "broken", interrupting("replies", after), eval_prompts=0)
    newest = next((files / "broken").rglob("learner-1.pt"))
    newest.with_name("learner-2.pt").write_bytes(newest.read_bytes()[:1000])  # as a failing disk leaves it
    resumed = run(files, "broken", eval_prompts=0)
    assert resumed.head.fingerprint == whole.head.fingerprint


def test_a_head_that_stops_deciding_is_kept_as_it_was_before(files, monkeypatch, notes):
    monkeypatch.setattr("mara_integrations.training.methods.sac.collapse", lambda stats: "it gave up")
    result = run(files, reporter=notes, eval_prompts=0)
    assert len(rounds(files / "head")) == 1
    assert float(result.head.output_linear.weight.abs().max()) == 0, "as before the first round"
    assert any("stopped after round 1, because the head no longer decides: it gave up" in line for line in notes.lines)


def test_what_can_not_work_is_refused(files, monkeypatch):
    with pytest.raises(ConfigError, match=r"kl_budget=0\.1 is not allowed: a head of the paper's form has no scale"):
        run(files, form="paper", kl_budget=0.1)
    hungry = replace(default_settings("paper"), warmup=65_536)
    monkeypatch.setattr("mara_integrations.training.methods.sac.default_settings", lambda form, credit: hungry)
    with pytest.raises(ConfigError, match=r"max_replies=32 is not enough.*65536 decisions"):
        run(files)
