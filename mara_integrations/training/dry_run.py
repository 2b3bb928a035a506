"""A training run without the training: check everything, estimate time and memory, write nothing."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.markup import escape

from mara_integrations.errors import OutputError
from mara_integrations.progress import Reporter
from mara_integrations.training.collect.rewards import check_reward
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.context import Run
from mara_integrations.training.engine import with_choices
from mara_integrations.training.estimate import Expected, expect
from mara_integrations.training.identity import Identity
from mara_integrations.training.plan import make_plan
from mara_integrations.training.run import start
from mara_integrations.training.scoring.llm_judges import check_judges, expected_calls, open_judges
from mara_integrations.training.teachers import model_bytes


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will take, roughly.

    Attributes:
        expected: Replies, time and hidden states.
        model_bytes: Memory of the model's weights, and of the copy of them that is fast to multiply by; that of the
            largest teacher counts too.
        peak_bytes: Memory of the process at its peak; None where the system does not tell.
        states_bytes: Hidden states that are stored, on disk and, as they are used, in memory.
        free_bytes: Free space on the disk of the output folder.
    """

    expected: Expected
    model_bytes: int
    peak_bytes: int | None
    states_bytes: int
    free_bytes: int

    @property
    def replies(self) -> int:
        """Number of replies to generate or to read."""
        return self.expected.replies

    @property
    def seconds(self) -> float:
        """Time of the run, without loading the model."""
        return self.expected.collect_s + self.expected.fit_s + self.expected.evaluate_s


def dry_run(config: TrainConfig, reporter: Reporter | None = None) -> Estimate:
    """Check what `train` would check, generate a few replies, and estimate the rest.

    Raises:
        OutputError: If there is too little space on the disk.
        MaraError: See `train`.
    """
    reporter = reporter or Reporter()
    config = with_choices(config, reporter)
    plan = make_plan(config)
    run = start(config, plan, Identity.of(config, plan), reporter)
    try:
        open_judges(run, is_trial=True)
        check_judges(run)
        if plan.learns_from_reward:
            check_reward(run)
        estimate = _estimate(run)
    finally:
        run.workers.close()
    _report(run, estimate)
    _report_judges(run)
    if estimate.states_bytes > estimate.free_bytes:
        raise OutputError(
            f"{str(config.output)!r} has {_mib(estimate.free_bytes)} of free space; the run stores about "
            f"{_mib(estimate.states_bytes)}",
            hint="free some, name another folder, or lower --max-replies",
        )
    return estimate


def _estimate(run: Run) -> Estimate:
    expected = expect(run)
    states_bytes = 2 * expected.states * run.model.hidden_size
    peak = _peak_bytes(run.model.device)
    return Estimate(
        expected,
        model_bytes=model_bytes(run.model, run.backend) + _largest_teacher(run),
        peak_bytes=None if peak is None else peak + states_bytes,
        states_bytes=states_bytes,
        free_bytes=_free_bytes(run.config.output),
    )


def _report(run: Run, estimate: Estimate) -> None:
    expected = estimate.expected
    cached = f", of which {expected.cached} are in the cache" if expected.cached else ""
    run.say(
        f"[bold]Time[/]   up to about {_minutes(estimate.seconds)}: {_minutes(expected.collect_s)} for "
        f"{expected.replies} replies of up to {run.config.max_reply_tokens} tokens{cached}, "
        f"{_minutes(expected.fit_s)} for the fits, {_minutes(expected.evaluate_s)} for the evaluation"
    )
    models = "the model and the largest teacher" if run.teachers else "the model"
    peak = "" if estimate.peak_bytes is None else f"about {_mib(estimate.peak_bytes)} at the peak: "
    run.say(
        f"[bold]Memory[/] {peak}{_mib(estimate.model_bytes)} for {models}, about {_mib(estimate.states_bytes)} for "
        f"hidden states; {_mib(estimate.free_bytes)} are free on the disk"
    )


def _report_judges(run: Run) -> None:
    """Say how often LLM judges will be asked."""
    calls = expected_calls(run)
    if not calls:
        return
    of_each = ", ".join(f"up to {count} of {escape(name)}" for name, count in calls.items())
    run.say(
        f"[bold]Judges[/] {of_each}, less what was judged before; --max-judge-calls stops a run at "
        f"{run.config.max_judge_calls}"
    )


def _largest_teacher(run: Run) -> int:
    """Return the memory of the largest teacher: one at a time is loaded beside the model."""
    return max((teacher.num_bytes for teacher in run.teachers.values()), default=0)


def _peak_bytes(device: torch.device) -> int | None:
    """Return the most memory that this process has taken so far, that of the device included."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return taken + (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)


def _free_bytes(folder: Path) -> int:
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if os.path.isdir(parent))
    return shutil.disk_usage(nearest).free


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:.0f} GiB"
