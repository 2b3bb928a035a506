"""A training run without the training: everything is checked, its time and memory are estimated, nothing is written."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from mara_integrations.errors import OutputError
from mara_integrations.models.int8 import weight_bytes
from mara_integrations.progress import Reporter
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.context import Run
from mara_integrations.training.gather import (
    Written,
    limited_prompts,
    prompts_of,
    replies_each,
    try_reward,
    written_replies,
)
from mara_integrations.training.methods.rloo import num_rounds, sides
from mara_integrations.training.rollouts.replies import read_replies
from mara_integrations.training.rollouts.writers import Part
from mara_integrations.training.run import begin
from mara_integrations.training.scoring.partial_rewards import asks_partial_text

_TRIED_REPLIES, _TRIED_TOKENS = 8, 8


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will take, roughly: replies are counted at full length, and the fits are not counted.

    Attributes:
        replies: Base replies to write, or given ones to read, fitted on and held out.
        gather_s: To write or read them, in seconds.
        evaluate_s: For the final evaluation, in seconds.
        model_bytes: The model's weights in memory.
        states_bytes: Hidden states that are kept, in memory and on disk.
        free_bytes: On the disk of the output folder.
    """

    replies: int
    gather_s: float
    evaluate_s: float
    model_bytes: int
    states_bytes: int
    free_bytes: int


def rehearse(config: TrainConfig, reporter: Reporter | None = None) -> Estimate:
    """Check what `train` would, ask model and reward for a few replies, and estimate the rest.

    Raises:
        OutputError: If there is too little space on the disk.
        MaraError: As of `train`.
    """
    run = begin(config, reporter or Reporter())
    try:
        if run.plan.source == "reward":
            try_reward(run)
        estimate = _estimate(run)
    finally:
        run.writers.close()
    run.say(
        f"[bold]Time[/]   about {_minutes(estimate.gather_s)} for {estimate.replies} replies of up to "
        f"{config.max_reply_tokens} tokens, {_minutes(estimate.evaluate_s)} for the evaluation; the fits come on top"
    )
    run.say(
        f"[bold]Memory[/] {_mib(estimate.model_bytes)} for the model, about {_mib(estimate.states_bytes)} for hidden "
        f"states; {_mib(estimate.free_bytes)} are free on the disk"
    )
    if estimate.states_bytes > estimate.free_bytes:
        raise OutputError(
            f"{str(config.output)!r} has {_mib(estimate.free_bytes)} of free space; the run keeps about "
            f"{_mib(estimate.states_bytes)}",
            hint="free some, name another folder, or lower --max-replies",
        )
    return estimate


def _estimate(run: Run) -> Estimate:
    config, method = run.config, run.plan.method
    write_s, states_a_reply = _tried(run)
    given = [text for data in (run.plan.train, run.plan.held_out) for text in written_replies(run, data)[0]]
    to_read = 0 if method.keeps_candidates or run.plan.source == "reward" else len(given)
    read_s = _seconds_to_read(run, given) if to_read else 0.0
    to_write = _replies_to_write(run)
    held_out = {(row.prompt, row.tools) for row in run.plan.prompts[1].rows}
    evaluated = 2 * min(len(held_out), config.eval_prompts)
    return Estimate(
        replies=to_write + to_read,
        gather_s=to_write * write_s + to_read * read_s,
        evaluate_s=evaluated * write_s,
        model_bytes=weight_bytes(run.model.model),
        states_bytes=int(2 * (to_write + to_read) * states_a_reply * run.model.hidden_size),
        free_bytes=_free_bytes(config.output),
    )


def _replies_to_write(run: Run) -> int:
    """Of the base model and of the gate, as far as they can be told in advance: rounds may end early."""
    config, plan = run.config, run.plan
    if plan.method.name in ("sac", "sac-published"):
        return run.max_replies
    if plan.method.keeps_candidates:
        by_parts = plan.reward is None or asks_partial_text(run)  # a reward model that is to be fitted takes them
        fitting, checking = (len(side.prompts) * side.each for side in sides(run, by_parts))
        rounds = num_rounds(run, by_parts)
        return fitting + rounds * (fitting // 4) + (2 + rounds) * checking
    if plan.source not in ("reward", "rule"):
        return 0
    counts = [len(limited_prompts(run, data)) for data in (plan.train, plan.held_out)]
    corrections = config.correction_rounds if plan.source == "rule" else 0
    each = replies_each(run) if plan.source == "reward" else min(2, replies_each(run))
    return sum(count * (each + corrections) for count in counts)


def _tried(run: Run) -> tuple[float, float]:
    """Seconds for one reply of several written at once, and the hidden states it leaves, from a few short ones."""
    prompts = prompts_of(run, run.plan.prompts[0])[:_TRIED_REPLIES]
    sampling = run.sampling(max_new_tokens=min(_TRIED_TOKENS, run.config.max_reply_tokens))
    head = run.new_head().eval() if run.plan.method.keeps_candidates else None
    began = time.perf_counter()
    replies = Part(prompts, sampling, run.config.seed, head=head).write(run.model, run.backend)
    longer = run.config.max_reply_tokens / sampling.max_new_tokens
    states = sum(len(reply.states) + sum(len(p.states) for p in reply.positions) for reply in replies)
    return (time.perf_counter() - began) * longer / len(prompts), states * longer / len(prompts)


def _seconds_to_read(run: Run, given: list[Written]) -> float:
    tried = given[:_TRIED_REPLIES]
    began = time.perf_counter()
    read_replies(run.model, run.backend, tried, max_tokens=run.config.max_reply_tokens)
    return (time.perf_counter() - began) / len(tried)


def _free_bytes(folder: Path) -> int:
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if os.path.isdir(parent))
    return shutil.disk_usage(nearest).free


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:.0f} GiB"
