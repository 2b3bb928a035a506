"""A training run without the training: everything is checked, its time and memory are estimated, nothing is written."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from mara_integrations.errors import OutputError
from mara_integrations.progress import Reporter
from mara_integrations.training.bank import read_replies
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.context import Run
from mara_integrations.training.gather import Written, prompts_of, replies_each, try_reward, written_replies
from mara_integrations.training.run import begin
from mara_integrations.training.writing import Part

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
    config = run.config
    wrote_s = _seconds_to_write(run) * config.max_reply_tokens / min(_TRIED_TOKENS, config.max_reply_tokens)
    given = [text for data in (run.plan.train, run.plan.held_out) for text in written_replies(run, data)[0]]
    read_s = _seconds_to_read(run, given) if given else 0.0
    to_write = 0
    if run.plan.source in ("reward", "rule"):
        for data in (run.plan.train, run.plan.held_out):
            count = min(len(prompts_of(run, data)), run.max_replies)
            to_write += count * replies_each(run, count)
    to_read = len(given) if run.plan.source != "reward" else 0
    held_out = {(row.prompt, row.tools) for row in run.plan.held_out.rows}
    evaluated = 2 * min(len(held_out), config.eval_prompts)
    parameters = run.model.model.parameters()
    return Estimate(
        replies=to_write + to_read,
        gather_s=to_write * wrote_s + to_read * read_s,
        evaluate_s=evaluated * wrote_s,
        model_bytes=sum(p.numel() * p.element_size() for p in parameters),
        states_bytes=2 * (to_write + to_read) * (config.max_reply_tokens + 1) * run.model.hidden_size,
        free_bytes=_free_bytes(config.output),
    )


def _seconds_to_write(run: Run) -> float:
    """For one short reply of several written at once."""
    prompts = prompts_of(run, run.plan.train)[:_TRIED_REPLIES]
    sampling = run.sampling(max_new_tokens=min(_TRIED_TOKENS, run.config.max_reply_tokens))
    began = time.perf_counter()
    Part(prompts, sampling, run.config.seed).write(run.model, run.backend)
    return (time.perf_counter() - began) / len(prompts)


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
