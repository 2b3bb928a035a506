"""Trials of a few replies, and what they let expect of all: the time of a run, and the tokens it feeds to the model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from mara_integrations.engine.backends.prefix_cache import BLOCK_TOKENS
from mara_integrations.engine.backends.protocol import Backend, Segment
from mara_integrations.heads.q import QHead
from mara_integrations.messages import Conversation
from mara_integrations.rewards import Reward
from mara_integrations.training.collect.generated import num_cached, prompts_per_batch
from mara_integrations.training.collect.given import num_read_before
from mara_integrations.training.collect.prompts import distinct_prompts
from mara_integrations.training.collect.workload import Generation, Reading, Workload
from mara_integrations.training.context import Run
from mara_integrations.training.learning.fit import Epoch, Rows, Table, Targets, fit, outputs
from mara_integrations.training.learning.objectives import value_loss
from mara_integrations.training.methods.q_regression import fit_targets
from mara_integrations.training.methods.q_rewards import QLearner
from mara_integrations.training.methods.reward_model import fit_judge
from mara_integrations.training.methods.rloo import ResidualLearner
from mara_integrations.training.methods.rounds import PromptSide
from mara_integrations.training.rollouts.positions import Positions
from mara_integrations.training.rollouts.replies import Reply, encode_given, read_replies
from mara_integrations.training.rollouts.workers import RolloutBatch
from mara_integrations.training.scoring.q_scale import work_of_calibration

_TRIED_TOKENS, _TRIED_READINGS = 8, 16
_SCALED_IN_ROUNDS = ("rloo", "reward-model", "principle", "grounding", "teacher")  # which need no calibration after
_EVALUATED_TOGETHER = 64  # prompts of a batch of the evaluation
_READ_AGAIN = BLOCK_TOKENS // 2  # tokens of a prompt that are no whole block of the prefix cache, on average
_USUAL_EPOCHS = 10  # of the 20 that a fit may take by default: it stops early


@dataclass(frozen=True, slots=True)
class Expected:
    """What a run is expected to take.

    Attributes:
        generated: Number of replies of base model and gate.
        read: Number of given replies.
        cached: How many of the generated ones are in the cache, and take no time.
        collect_s: Time to generate, read and score them, in seconds.
        fit_s: Time of the fits, in seconds.
        evaluate_s: Time to set the head's scale and of the final evaluation, in seconds.
        tokens_fed: Tokens fed to the model in all, those of prompts and of passed over candidates included.
        states: Number of hidden states that are stored.
    """

    generated: int
    read: int
    cached: int
    collect_s: float
    fit_s: float
    evaluate_s: float
    tokens_fed: int
    states: int

    @property
    def replies(self) -> int:
        """Number of replies to generate or to read."""
        return self.generated + self.read


@dataclass(frozen=True, slots=True)
class Speed:
    """What one reply of a batch costs.

    Attributes:
        prompt_s: Time to read its prompt and to write the first token, in seconds.
        token_s: Time of a further token, in seconds.
        prompt_fed: Tokens fed for the first token.
        token_fed: Tokens fed for a further one: more than 1 where candidates are passed over.
        length: Expected number of tokens.
        replies: The replies of the trial.
    """

    prompt_s: float
    token_s: float
    prompt_fed: float
    token_fed: float
    length: float
    replies: list[Reply]

    @property
    def seconds(self) -> float:
        """Time of a reply."""
        return self.prompt_s + (self.length - 1.0) * self.token_s

    @property
    def fed(self) -> float:
        """Tokens fed for a reply."""
        return self.prompt_fed + (self.length - 1.0) * self.token_fed


class _Counting:
    """A backend that counts the tokens that it feeds."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self.num_fed = backend, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def feed(self, segments: Sequence[Segment]) -> Tensor:
        self.num_fed += sum(len(segment.token_ids) for segment in segments)
        return self._backend.feed(segments)


def expect(run: Run) -> Expected:
    """Try a few replies, and return what the whole run is expected to take."""
    workload = run.plan.method.work(run)
    trials = _Trials(run)
    generated = read = cached = states = 0
    collect_s = fed = 0.0
    tried: list[Reply] = []
    for planned in [*workload.generations, *_to_calibrate_on(run)]:
        known = num_cached(run, planned, trials.head if planned.is_gated else None)
        speed = trials.generate(planned.prompts, planned.replies_per_prompt, is_gated=planned.is_gated)
        collect_s += (len(planned) - known) * speed.seconds
        fed += (len(planned) - known) * speed.fed
        generated, cached = generated + len(planned), cached + known
        states += round(len(planned) * _states_per_reply(speed))
        tried = tried or speed.replies
    length = trials.length(tried) if tried else 0.0
    for reading in workload.readings:
        if not len(reading):
            continue
        known = 0 if reading.is_by_token else num_read_before(run, reading.given)
        seconds, reading_fed, length, tried_reading = trials.read(reading)
        collect_s, fed = collect_s + (len(reading) - known) * seconds, fed + (len(reading) - known) * reading_fed
        cached += known
        read, states = read + len(reading), states + round(len(reading) * (length + 1))
        tried = tried or tried_reading
    for again in workload.rereadings:  # a reply is fed at once, after its prompt
        speed = trials.generate(again.prompts, again.replies_per_prompt, is_gated=again.is_gated)
        num_tokens = len(again) * (speed.prompt_fed + speed.length)
        collect_s += num_tokens * again.relative_s * speed.prompt_s / speed.prompt_fed
        fed += num_tokens
    began = time.perf_counter()
    fitted = fit_judge(run) if run.plan.source in ("pairs", "labels") else {}
    fit_s = time.perf_counter() - began
    if workload.scored:
        reward = next(iter(fitted.values()), run.plan.reward)
        collect_s += workload.scored * length * _seconds_to_score_a_token(run, tried, reward)
    evaluate_s, evaluate_fed = trials.evaluation()
    fit_s += _seconds_to_fit_a_row(run, tried, trials) * _rows(run, workload, tried, length)
    return Expected(generated, read, cached, collect_s, fit_s, evaluate_s, round(fed + evaluate_fed), states)


class _Trials:
    """Trials of generating and reading, each kind once."""

    def __init__(self, run: Run) -> None:
        self._run, self._speeds = run, dict[tuple[int, int, bool], Speed]()
        self.head = run.new_head().eval()

    def generate(
        self, prompts: Sequence[Conversation], each: int, *, is_gated: bool, together: int | None = None
    ) -> Speed:
        """Return the speed of replies, by the batches that the run will generate.

        Args:
            prompts: Prompts to reply to.
            each: Replies to each prompt.
            is_gated: Whether the head of the method's form gates them.
            together: Prompts of a batch; None is the number in `generate_replies`.
        """
        count = min(len(prompts), together or prompts_per_batch(each))
        if (count, each, is_gated) not in self._speeds:
            step = max(1, len(prompts) // count)
            self._speeds[count, each, is_gated] = self._try(prompts[::step][:count], each, is_gated)
        return self._speeds[count, each, is_gated]

    def _try(self, prompts: Sequence[Conversation], each: int, is_gated: bool) -> Speed:
        run, most = self._run, self._run.config.max_reply_tokens
        changes = {"min_candidates": self.head.config.min_candidates} if is_gated else {}
        spent: list[tuple[float, int]] = []
        for num_tokens in (1, min(1 + _TRIED_TOKENS, most)):
            sampling = run.sampling(max_new_tokens=num_tokens, **changes)
            batch = RolloutBatch(prompts, sampling, run.config.seed, each, self.head if is_gated else None)
            counting, began = _Counting(run.backend), time.perf_counter()
            replies = batch.generate(run.model, cast(Backend, counting))
            spent.append((time.perf_counter() - began, counting.num_fed))
        count, further = len(replies), sum(len(reply.token_ids) - 1 for reply in replies)
        (first_s, first_fed), (all_s, all_fed) = spent
        per_token = max(1, further)
        return Speed(
            prompt_s=first_s / count,
            token_s=max(0.0, all_s - first_s) / per_token,
            prompt_fed=first_fed / count,
            token_fed=(all_fed - first_fed) / per_token,
            length=self.length(replies),
            replies=replies,
        )

    def length(self, replies: Sequence[Reply]) -> float:
        """Return the expected length of replies, if they end as often as those of the trial do."""
        most = self._run.config.max_reply_tokens
        ends = sum(reply.token_ids[-1] in self._run.model.eos_token_ids for reply in replies if reply.token_ids)
        rate = ends / max(1, sum(len(reply.token_ids) for reply in replies))
        return (1.0 - (1.0 - rate) ** most) / rate if rate else float(most)

    def read(self, reading: Reading) -> tuple[float, float, float, list[Reply]]:
        """Return the seconds and the tokens that a given reply takes, its length, and the replies of the trial."""
        run, most = self._run, self._run.config.max_reply_tokens
        step = max(2, 2 * len(reading) // _TRIED_READINGS)  # two that follow each other share a prompt in pairs
        given = [reply for start in range(0, len(reading), step) for reply in reading.given[start : start + 2]]
        counting, began = _Counting(run.backend), time.perf_counter()
        replies = read_replies(run.model, cast(Backend, counting), given, max_tokens=most)
        seconds, fed = (time.perf_counter() - began) / len(given), counting.num_fed / len(given)
        length = sum(len(encode_given(run.model, reply, most)[1]) for reply in given) / len(given)
        if reading.is_by_token:
            prompts = list(dict.fromkeys(cast(Conversation, reply.prompt) for reply in given))
            speed = self.generate(prompts, 1, is_gated=False)
            seconds = speed.prompt_s * len(prompts) / len(given) + length * speed.token_s
        return seconds, fed, length, replies

    def gated(self) -> Speed:
        """Return the speed of gated replies to held-out prompts, by the batches of the evaluation."""
        pool = distinct_prompts(self._run, self._run.plan.prompts[1])
        return self.generate(pool, 1, is_gated=True, together=_EVALUATED_TOGETHER)

    def evaluation(self) -> tuple[float, float]:
        """Return the seconds and the tokens of setting the scale and of the final evaluation."""
        run, method = self._run, self._run.plan.method
        pool = distinct_prompts(run, run.plan.prompts[1])
        num_evaluated = min(len(pool), run.config.eval_prompts)
        seconds = fed = 0.0
        base, gated = self.generate(pool, 1, is_gated=False, together=_EVALUATED_TOGETHER), self.gated()
        if num_evaluated:  # a prompt is read ahead, and each side reads again what is no whole block of it
            again = 2 * min(1.0, _READ_AGAIN / base.prompt_fed) - 1.0
            seconds += num_evaluated * (base.seconds + gated.seconds + (again * base.prompt_s))
            fed += num_evaluated * (base.fed + gated.fed + again * base.prompt_fed)
        if method.form == "q" or method.name in _SCALED_IN_ROUNDS:
            return seconds, fed
        count, tokens = 2 * min(12, len(distinct_prompts(run, run.plan.train))), min(16.0, gated.length)
        candidates = sum(len(p.token_ids) for reply in gated.replies for p in reply.positions)
        of_token = candidates / max(1, sum(len(reply.token_ids) for reply in gated.replies))  # all of them are fed
        return (
            seconds + count * (gated.prompt_s + tokens * of_token * gated.prompt_s / gated.prompt_fed),
            fed + count * (gated.prompt_fed + tokens * of_token),
        )


def _to_calibrate_on(run: Run) -> list[Generation]:
    """Return what setting the scale of a Q-head generates, where the method does not set it itself."""
    method = run.plan.method
    is_set_here = method.form == "q" and method.name not in _SCALED_IN_ROUNDS and run.kl_budget is not None
    return work_of_calibration(run) if is_set_here else []


def _states_per_reply(speed: Speed) -> float:
    """Return the number of hidden states that are kept of a reply."""
    kept = sum(len(reply.states) + sum(len(p.states) for p in reply.positions) for reply in speed.replies)
    return kept / max(1, sum(len(reply.states) for reply in speed.replies)) * (speed.length + 1)


def _seconds_to_score_a_token(run: Run, replies: list[Reply], reward: Reward | None) -> float:
    """Return the time to score a reply's beginnings and candidates, in seconds a token."""
    replies = [reply for reply in replies if reply.positions]
    if reward is None or not replies:
        return 0.0
    with_reward = replace(run, plan=replace(run.plan, reward=reward))
    data = run.plan.prompts[0]
    side = PromptSide(data, distinct_prompts(run, data), 1, 0)
    learner = (QLearner if run.plan.method.form == "q" else ResidualLearner)(with_reward, run.new_head())
    began = time.perf_counter()
    learner.score_parts(side, replies, [0.0] * len(replies))
    return (time.perf_counter() - began) / sum(len(reply.token_ids) for reply in replies)


def _rows(run: Run, workload: Workload, tried: Sequence[Reply], length: float) -> float:
    """Return the number of examples of all epochs of all fits."""
    per_token = 1.0
    if run.plan.method.keeps_candidates and run.plan.method.form != "q" and tried:  # one a decision
        decisions = sum(len(position.states) for reply in tried for position in reply.positions)
        per_token = max(1.0, decisions / max(1, sum(len(reply.token_ids) for reply in tried)))
    epochs = min(run.config.epochs, _USUAL_EPOCHS)
    return workload.fitted * length * per_token * epochs + workload.updates


def _seconds_to_fit_a_row(run: Run, tried: Sequence[Reply], trials: _Trials) -> float:
    """Return the time of one example in an epoch of a fit, in seconds: that of the second epoch, without the start."""
    with torch.random.fork_rng(devices=[]):
        head = run.new_head()
    ends: list[float] = []

    def on_epoch(epoch: Epoch) -> None:
        ends.append(time.perf_counter())

    if isinstance(head, QHead):
        positions = Positions.of([reply for reply in trials.gated().replies if reply.positions])
        targets = Targets(positions, torch.zeros(positions.token_ids.shape))
        fit_targets(run, head, targets, targets.take(_held_out_of(run, targets)), on_epoch, epochs=2)
        num_rows = len(targets)
    else:
        states = torch.cat([reply.states for reply in tried])
        rows, num_rows = Table(states, torch.zeros(len(states)), torch.ones(len(states))), len(states)
        settings = replace(run.fit_settings(3e-4), epochs=2)

        def loss(head: Any, table: Table) -> Tensor:
            return value_loss(outputs(head, table.states), table.targets, table.weights, is_binary=False)

        fit(head, rows, rows.take(_held_out_of(run, rows)), loss, settings, on_epoch)
    return (ends[-1] - ends[-2]) / max(1, num_rows)


def _held_out_of(run: Run, rows: Rows) -> Tensor:
    """Return the indices of as many rows as are held out of so many."""
    return torch.arange(max(1, round(run.config.held_out * len(rows))))
