"""The `sac` method: the paper's soft actor-critic, mended (`sac`) or as its code has it (`sac-published`).

The gate writes replies by its own coin flips, a reward says what they are worth, every decision goes into a replay
buffer, and critics, head and temperature are updated from there; round by round.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor

from mara_integrations.errors import ConfigError, DataError
from mara_integrations.heads.afterstate import AfterstateHead
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Conversation
from mara_integrations.sampling import GateParams
from mara_integrations.training import gather
from mara_integrations.training.context import Learned, Run
from mara_integrations.training.learning.actor_critic import (
    PUBLISHED,
    Learner,
    SACSettings,
    collapse,
    mended,
    vitals_of,
)
from mara_integrations.training.learning.credit import postback_credit, prefix_credit, published_kl, terminal_credit
from mara_integrations.training.learning.replay_buffer import ReplayBuffer, Transitions
from mara_integrations.training.records.store import as_dict, load, load_or_compute
from mara_integrations.training.rollouts.decisions import Decisions, decisions_taken
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.rollouts.writers import Part, Promise
from mara_integrations.training.scoring.partial_rewards import asks_partial_text, prefix_worths

_ROUND = 64  # episodes between updates: a full batch of the decoder
_VISITS = 8  # transitions a token the buffer has room for; a gate at work visits 2 to 4


def learn(run: Run, head: MARAHead) -> Learned:
    """Write, judge and update, round by round; stop where the head stops deciding, and keep it as it was before.

    Raises:
        ConfigError: If the replies can't fill the buffer to where updates begin.
        DataError: If the reward has no opinion on any reply of a round.
    """
    assert isinstance(head, AfterstateHead)
    settings = settings_of(run)
    num_rounds = -(-run.max_replies // _ROUND)
    num_tokens = num_rounds * _ROUND * run.config.max_reply_tokens
    if num_tokens < settings.warmup:
        raise ConfigError(
            f"max_replies={run.max_replies} is not enough for method {run.plan.method.name!r}, which updates "
            f"the head once {settings.warmup} decisions are there",
            hint=f"--max-replies {-(-settings.warmup // run.config.max_reply_tokens)}, or longer replies",
        )
    learner = Learner(head, settings, run.config.seed)
    buffer = ReplayBuffer(
        min(settings.capacity, _VISITS * num_tokens), head.config.hidden_size, run.folder / "replay-buffer"
    )
    prompts = gather.limited_prompts(run, run.plan.train)
    run.random().shuffle(prompts)
    scale: float | None = None  # found in the first round
    with run.stage("episodes", num_rounds * _ROUND) as advance:
        rounds = _Rounds(run, prompts, advance)
        num_done = _resume(run, learner, rounds)
        for number in range(num_rounds):
            if number >= num_done:
                rounds.begin(range(number, min(number + run.config.staleness + 1, num_rounds)), head)
            gather_round = partial(_gather, run, settings, rounds, number, head, scale)
            episodes, was_kept = load_or_compute(rounds.file(number), gather_round)
            if was_kept:
                advance(_ROUND)
            scale, transitions = episodes["scale"], Transitions(**episodes["transitions"])
            buffer.add(transitions)
            if number < num_done:
                continue
            before = copy.deepcopy(head.state_dict())
            figures: dict[str, float] = {}
            if len(buffer) >= settings.warmup:
                for _ in range(settings.updates * _ROUND):
                    figures = learner.update(buffer.sample(settings.batch_size, learner.generator, learner.device))
            run.log("round", number=number + 1, **episodes["figures"], **figures)
            problem = collapse(vitals_of(head, transitions))
            if problem is not None:
                head.load_state_dict(before)
                _report_collapse(run, number + 1, problem)
                break
            _keep(run, learner, rounds, number + 1)
    head.eval().requires_grad_(False)
    return Learned()


def settings_of(run: Run) -> SACSettings:
    """The preset of the run's method and form, with what the run's settings say otherwise."""
    config, method = run.config, run.plan.method
    if method.name == "sac-published":
        preset = replace(PUBLISHED, credit=config.credit or PUBLISHED.credit)
    else:
        preset = mended(method.form, config.credit or ("prefix" if asks_partial_text(run) else "terminal"))
    return replace(preset, learning_rate=config.learning_rate or preset.learning_rate)


class _Rounds:
    """Rounds of episodes that are being written, each by a copy of the head as it was when the round began."""

    def __init__(self, run: Run, prompts: Sequence[Conversation], on_reply: Callable[[int], None]) -> None:
        self._run, self._prompts, self._on_reply = run, prompts, on_reply
        self.heads: dict[int, AfterstateHead] = {}
        self._promises: dict[int, Promise] = {}

    def file(self, number: int) -> Path:
        """Where a round is kept."""
        return self._run.folder / f"episodes-{number}.pt"

    def prompts(self, number: int) -> list[Conversation]:
        """Those of a round, from the first on again where they end."""
        return [self._prompts[(number * _ROUND + i) % len(self._prompts)] for i in range(_ROUND)]

    def begin(self, numbers: Iterable[int], head: AfterstateHead) -> None:
        """Begin those of the rounds that are neither written nor under way."""
        for number in numbers:
            if number not in self.heads and not self.file(number).exists():
                self._begin(number, head)

    def _begin(self, number: int, head: AfterstateHead) -> None:
        self.heads[number] = writer = copy.deepcopy(head).eval().requires_grad_(False)
        sampling = self._run.sampling(min_candidates=head.config.min_candidates)
        seed, gate = self._run.config.seed + number * _ROUND, GateParams(selection="sample")
        part = Part(self.prompts(number), sampling, seed, head=writer, gate=gate)
        self._promises[number] = self._run.writers.submit(part, self._on_reply)

    def collect(self, number: int, head: AfterstateHead) -> tuple[AfterstateHead, list[Reply]]:
        """A round's replies, and the head that wrote them: this one, where the file of a finished round is damaged."""
        if number not in self.heads:
            self._begin(number, head)
        return self.heads.pop(number), self._promises.pop(number)()


def _gather(
    run: Run, settings: SACSettings, rounds: _Rounds, number: int, head: AfterstateHead, scale: float | None
) -> dict[str, Any]:
    """One round as plain data: transitions, figures, and what worths are divided by."""
    prompts = rounds.prompts(number)
    head, replies = rounds.collect(number, head)
    values = gather.scores(run, run.plan.train, prompts, replies)
    judged = [(reply, value) for reply, value in zip(replies, values, strict=True) if value is not None]
    if not judged:
        raise DataError(f"the reward had no opinion on any of {_ROUND} replies", hint="check the reward function")
    replies, worths = [reply for reply, _ in judged], [value for _, value in judged]
    if scale is None:
        scale = statistics.pstdev(worths) if settings.standardise else 1.0
        if scale == 0:
            message = f"the reward gave every reply {worths[0]}: nothing to learn from"
            raise DataError(message, hint="check the reward function")
    decisions = decisions_taken(replies, with_forced=settings.last_is_asked)
    rewards = _rewards(run, settings, prompts, replies, worths, decisions) / scale
    if settings.kl == "published":
        rewards += published_kl(head, replies, settings.kl_weight)
    ends = torch.zeros(len(rewards), dtype=torch.bool)
    ends[decisions.counts.cumsum(0)[decisions.counts > 0] - 1] = True
    transitions = Transitions(decisions.states, decisions.hazard_logits, decisions.accepted, rewards, ends)

    vitals = vitals_of(head, transitions)
    num_tokens = sum(len(reply.token_ids) for reply in replies)
    figures = {
        "mean_reward": statistics.fmean(worths),
        "accept_rate": vitals.accept_rate,
        "decision_entropy": vitals.entropy,
        "kl_per_token": vitals.kl * len(rewards) / num_tokens,
        "visits_per_token": len(rewards) / max(1, sum(len(reply.positions) for reply in replies)),
    }
    return {"transitions": as_dict(transitions), "figures": figures, "scale": scale}


def _rewards(
    run: Run,
    settings: SACSettings,
    prompts: Sequence[Conversation],
    replies: Sequence[Reply],
    worths: Sequence[float],
    decisions: Decisions,
) -> Tensor:
    """What each decision gets of what its reply was worth, (N,)."""
    if settings.credit == "prefix":
        return prefix_credit(decisions, prefix_worths(run, run.plan.train, prompts, replies, worths))
    mean = statistics.fmean(worths) if settings.standardise else 0.0
    centred = [worth - mean for worth in worths]
    if settings.credit == "terminal":
        return terminal_credit(decisions, centred)
    return postback_credit(decisions, centred, settings.gamma, spare_first=settings.spare_first)


def _report_collapse(run: Run, number: int, problem: str) -> None:
    run.log("collapse", round=number, problem=problem)
    run.say(
        f"  [yellow]stopped after round {number}: the head no longer decides, {escape(problem)}. It is kept as it was "
        "before that round. A smaller --learning-rate may carry further.[/]"
    )


def _keep(run: Run, learner: Learner, rounds: _Rounds, num_done: int) -> None:
    """Write all but the episodes, which have their own files; of older states, one stays."""
    writing = {number: head.state_dict() for number, head in rounds.heads.items()}
    state = {"learner": learner.state_dict(), "writing": writing}
    load_or_compute(run.folder / f"learner-{num_done}.pt", lambda: state)
    (run.folder / f"learner-{num_done - 2}.pt").unlink(missing_ok=True)


def _resume(run: Run, learner: Learner, rounds: _Rounds) -> int:
    """Take up the newest state that is whole; returns the number of rounds it has behind it."""
    files = {int(path.stem.partition("-")[2]): path for path in run.folder.glob("learner-*.pt")}
    for num_done in sorted(files, reverse=True):
        state = load(files[num_done])
        if state is None:
            run.say(f"  [yellow]{escape(files[num_done].name)} is damaged: going on from the round before[/]")
            continue
        for number, weights in state["writing"].items():
            learner.actor.load_state_dict(weights)
            rounds.begin([number], learner.actor)
        learner.load_state_dict(state["learner"])
        run.say(f"  going on after round {num_done}")
        return num_done
    return 0
