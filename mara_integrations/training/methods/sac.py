"""The `sac` method: the paper's soft actor-critic.

Round by round, the gate samples its decisions and generates replies, a reward scores them, every decision goes into a
replay buffer as a transition, and head, critics and temperature are updated from there.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from rich.markup import escape
from torch import Tensor

from mara_integrations.errors import ConfigError
from mara_integrations.heads.afterstate import AfterstateHead
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Conversation
from mara_integrations.sampling import GateParams
from mara_integrations.training.collect.prompts import limited_prompts
from mara_integrations.training.collect.rewards import check_differ, score_replies, with_opinion
from mara_integrations.training.collect.workload import Generation, Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.learning.actor_critic import (
    Learner,
    SACSettings,
    collapse,
    decision_stats,
    default_settings,
)
from mara_integrations.training.learning.credit import postback_credit, prefix_credit, terminal_credit
from mara_integrations.training.learning.replay_buffer import ReplayBuffer, Transitions
from mara_integrations.training.records.store import as_dict, load, load_or_compute
from mara_integrations.training.rollouts.decisions import Decisions, decisions_of
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.rollouts.workers import PendingReplies, RolloutBatch
from mara_integrations.training.scoring.partial_rewards import prefix_rewards, uses_partial_text

_REPLIES_PER_ROUND = 64  # a full batch of the decoder
_TRANSITIONS_PER_TOKEN = 8  # that the buffer has room for; a trained gate visits 2 to 4 candidates a token


class Rollout(NamedTuple):
    """The replies of one round.

    Attributes:
        head: Head that generated them.
        prompts: Their prompts.
        replies: The replies that the reward has an opinion on.
        rewards: Their rewards.
        decisions: Their decisions.
    """

    head: AfterstateHead
    prompts: list[Conversation]
    replies: list[Reply]
    rewards: list[float]
    decisions: Decisions


# Returns the immediate reward of each decision, (N,), before it is divided by the rewards' standard deviation.
AssignCredit: TypeAlias = Callable[[Run, SACSettings, Rollout], Tensor]


def train(run: Run, head: MARAHead) -> MethodResult:
    """Train a head by soft actor-critic; see `train_with`."""
    return train_with(run, head, settings_of(run), assign_credit)


def train_with(run: Run, head: MARAHead, settings: SACSettings, credit: AssignCredit) -> MethodResult:
    """Generate, score and update, round by round.

    The run stops where the head decides all candidates alike, and keeps the head as it was before that round.

    Raises:
        ConfigError: If there are too few replies to fill the buffer to where updates begin.
        DataError: If the reward has no opinion on any reply of a round.
    """
    assert isinstance(head, AfterstateHead), "the forms of this method"
    num_rounds = -(-run.max_replies // _REPLIES_PER_ROUND)
    num_tokens = num_rounds * _REPLIES_PER_ROUND * run.config.max_reply_tokens
    if num_tokens < settings.warmup:
        raise ConfigError(
            f"max_replies={run.max_replies} is not enough: the head is updated once there are {settings.warmup} "
            "decisions",
            hint=f"--max-replies {-(-settings.warmup // run.config.max_reply_tokens)}, or longer replies",
        )
    learner = Learner(head, settings, run.config.seed)
    capacity = min(settings.capacity, _TRANSITIONS_PER_TOKEN * num_tokens)
    buffer = ReplayBuffer(capacity, head.config.hidden_size, run.folder / "replay-buffer")
    prompts = limited_prompts(run, run.plan.train)
    run.random().shuffle(prompts)
    deviation: float | None = None  # of the rewards, found in the first round
    with run.stage("replies", num_rounds * _REPLIES_PER_ROUND) as advance:
        rounds = _Rounds(run, prompts, advance)
        num_done = _resume(run, learner, rounds)
        for number in range(num_rounds):
            if number >= num_done:
                rounds.start(range(number, min(number + run.config.staleness + 1, num_rounds)), head)
            collect = partial(_collect_round, run, settings, credit, rounds, number, head, deviation)
            collected, was_stored = load_or_compute(rounds.file(number), collect)
            if was_stored:
                advance(_REPLIES_PER_ROUND)
            deviation, transitions = collected["deviation"], Transitions(**collected["transitions"])
            buffer.add(transitions)
            if number < num_done:
                continue
            before = copy.deepcopy(head.state_dict())
            metrics: dict[str, float] = {}
            if len(buffer) >= settings.warmup:
                for _ in range(settings.updates * _REPLIES_PER_ROUND):
                    metrics = learner.update(buffer.sample(settings.batch_size, learner.generator, learner.device))
            run.log("round", number=number + 1, **collected["metrics"], **metrics)
            problem = collapse(decision_stats(head, transitions))
            if problem is not None:
                head.load_state_dict(before)
                _report_collapse(run, number + 1, problem)
                break
            _store_learner(run, learner, rounds, number + 1)
    head.eval().requires_grad_(False)
    return MethodResult()


def work(run: Run) -> Workload:
    """Return what `train` will do if the head does not collapse."""
    prompts, settings = limited_prompts(run, run.plan.train), settings_of(run)
    num_rounds = -(-run.max_replies // _REPLIES_PER_ROUND)
    of_a_round = [prompts[i % len(prompts)] for i in range(_REPLIES_PER_ROUND)]
    rounds = [Generation(of_a_round, is_gated=True)] * num_rounds
    num_updates = num_rounds * _REPLIES_PER_ROUND * settings.updates
    networks = 4  # the head, two critics, and what their targets cost
    scored = num_rounds * _REPLIES_PER_ROUND if settings.credit == "prefix" else 0
    return Workload(rounds, updates=num_updates * settings.batch_size * networks, scored=scored)


def settings_of(run: Run) -> SACSettings:
    """Return the default settings of the run's form of head, with the changes that the run's settings make."""
    config = run.config
    defaults = default_settings(
        run.plan.method.form, config.credit or ("prefix" if uses_partial_text(run) else "terminal")
    )
    return replace(defaults, learning_rate=config.learning_rate or defaults.learning_rate)


def assign_credit(run: Run, settings: SACSettings, rollout: Rollout) -> Tensor:
    """Return the immediate reward of each decision, as the settings assign credit, (N,)."""
    if settings.credit == "prefix":
        prefixes = prefix_rewards(run, run.plan.train, rollout.prompts, rollout.replies, rollout.rewards)
        return prefix_credit(rollout.decisions, prefixes)
    mean = statistics.fmean(rollout.rewards) if settings.standardise else 0.0
    centred = [reward - mean for reward in rollout.rewards]
    if settings.credit == "terminal":
        return terminal_credit(rollout.decisions, centred)
    return postback_credit(rollout.decisions, centred, settings.gamma)


class _Rounds:
    """Rounds of replies that are being generated, each by a copy of the head as it was when the round started."""

    def __init__(self, run: Run, prompts: Sequence[Conversation], on_reply: Callable[[int], None]) -> None:
        self._run, self._prompts, self._on_reply = run, prompts, on_reply
        self.heads: dict[int, AfterstateHead] = {}
        self._pending: dict[int, PendingReplies] = {}

    def file(self, number: int) -> Path:
        """Return the file of a round's stored transitions."""
        return self._run.stored("episodes", number)

    def prompts(self, number: int) -> list[Conversation]:
        """Return the prompts of a round; after the last prompt comes the first again."""
        return [
            self._prompts[(number * _REPLIES_PER_ROUND + i) % len(self._prompts)] for i in range(_REPLIES_PER_ROUND)
        ]

    def start(self, numbers: Iterable[int], head: AfterstateHead) -> None:
        """Start those of the rounds that are neither stored nor started."""
        for number in numbers:
            if number not in self.heads and not self.file(number).exists():
                self._start(number, head)

    def _start(self, number: int, head: AfterstateHead) -> None:
        self.heads[number] = frozen = copy.deepcopy(head).eval().requires_grad_(False)
        sampling = self._run.sampling(min_candidates=head.config.min_candidates)
        seed, gate = self._run.config.seed + number * _REPLIES_PER_ROUND, GateParams(selection="sample")
        batch = RolloutBatch(self.prompts(number), sampling, seed, head=frozen, gate=gate)
        self._pending[number] = self._run.workers.submit(batch, self._on_reply)

    def result(self, number: int, head: AfterstateHead) -> tuple[AfterstateHead, list[Reply]]:
        """Return the head that generated a round and its replies; start the round if its stored file is damaged."""
        if number not in self.heads:
            self._start(number, head)
        return self.heads.pop(number), self._pending.pop(number)()


def _collect_round(
    run: Run,
    settings: SACSettings,
    credit: AssignCredit,
    rounds: _Rounds,
    number: int,
    head: AfterstateHead,
    deviation: float | None,
) -> dict[str, Any]:
    """Return one round as plain data: transitions, metrics, and the deviation that rewards are divided by."""
    prompts = rounds.prompts(number)
    head, generated = rounds.result(number, head)
    scores = score_replies(run, run.plan.train, prompts, generated)
    replies, rewards = map(list, zip(*with_opinion("replies", generated, scores), strict=True))
    if deviation is None:
        if settings.standardise:
            check_differ(rewards)
        deviation = statistics.pstdev(rewards) if settings.standardise else 1.0
    decisions = decisions_of(replies, include_forced=settings.include_forced)
    immediate = credit(run, settings, Rollout(head, prompts, replies, rewards, decisions)) / deviation
    ends = torch.zeros(len(immediate), dtype=torch.bool)
    ends[decisions.counts.cumsum(0)[decisions.counts > 0] - 1] = True
    transitions = Transitions(decisions.states, decisions.hazard_logits, decisions.accepted, immediate, ends)

    stats = decision_stats(head, transitions)
    num_tokens = sum(len(reply.token_ids) for reply in replies)
    metrics = {
        "mean_reward": statistics.fmean(rewards),
        "accept_rate": stats.accept_rate,
        "decision_entropy": stats.entropy,
        "kl_per_token": stats.kl * len(immediate) / num_tokens,
        "candidates_per_token": len(immediate) / max(1, sum(len(reply.positions) for reply in replies)),
    }
    return {"transitions": as_dict(transitions), "metrics": metrics, "deviation": deviation}


def _report_collapse(run: Run, number: int, problem: str) -> None:
    run.log("collapse", round=number, problem=problem)
    run.say(
        f"  [yellow]stopped after round {number}, because the head no longer decides: {escape(problem)}. It is kept as "
        "it was before that round. A smaller --learning-rate may get further.[/]"
    )


def _store_learner(run: Run, learner: Learner, rounds: _Rounds, num_done: int) -> None:
    """Store everything but the transitions, which have their own files; of older states, one stays."""
    generating = {number: head.state_dict() for number, head in rounds.heads.items()}
    state = {"learner": learner.state_dict(), "generating": generating}
    load_or_compute(run.stored("learner", num_done), lambda: state)
    run.stored("learner", num_done - 2).unlink(missing_ok=True)


def _resume(run: Run, learner: Learner, rounds: _Rounds) -> int:
    """Restore the newest stored state that is whole; return the number of rounds it has behind it."""
    files = {int(path.stem.partition("-")[2]): path for path in run.folder.glob("learner-*.pt")}
    for num_done in sorted(files, reverse=True):
        state = load(files[num_done])
        if state is None:
            run.say(f"  [yellow]{escape(files[num_done].name)} is damaged: continuing from the round before[/]")
            continue
        for number, weights in state["generating"].items():
            learner.actor.load_state_dict(weights)
            rounds.start([number], learner.actor)
        learner.load_state_dict(state["learner"])
        run.say(f"  continuing after round {num_done}")
        return num_done
    return 0
