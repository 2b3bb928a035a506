"""A training run without the training: check everything, estimate time and memory, write nothing."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from mara_integrations.errors import OutputError
from mara_integrations.models.int8 import weight_bytes
from mara_integrations.progress import Reporter
from mara_integrations.training.collect.given import given_replies
from mara_integrations.training.collect.prompts import distinct_prompts, limited_prompts, replies_per_prompt
from mara_integrations.training.collect.rewards import check_reward
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.context import Run
from mara_integrations.training.identity import Identity
from mara_integrations.training.methods.rounds import num_rounds, prompt_sides
from mara_integrations.training.plan import make_plan
from mara_integrations.training.rollouts.replies import GivenReply, read_replies
from mara_integrations.training.rollouts.workers import RolloutBatch
from mara_integrations.training.run import start
from mara_integrations.training.scoring.partial_rewards import uses_partial_text

_TRIED_REPLIES, _TRIED_TOKENS = 8, 8


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will take, roughly. Replies are counted at full length, and fits are not counted.

    Attributes:
        replies: Number of replies to generate or to read.
        collect_s: Time to generate or read them, in seconds.
        evaluate_s: Time of the final evaluation, in seconds.
        model_bytes: Memory of the model's weights.
        states_bytes: Hidden states that are stored, in memory and on disk.
        free_bytes: Free space on the disk of the output folder.
    """

    replies: int
    collect_s: float
    evaluate_s: float
    model_bytes: int
    states_bytes: int
    free_bytes: int


def dry_run(config: TrainConfig, reporter: Reporter | None = None) -> Estimate:
    """Check what `train` would check, generate a few replies, and estimate the rest.

    Raises:
        OutputError: If there is too little space on the disk.
        MaraError: See `train`.
    """
    plan = make_plan(config)
    run = start(config, plan, Identity.of(config, plan), reporter or Reporter())
    try:
        if plan.source == "reward":
            check_reward(run)
        estimate = _estimate(run)
    finally:
        run.workers.close()
    run.say(
        f"[bold]Time[/]   about {_minutes(estimate.collect_s)} for {estimate.replies} replies of up to "
        f"{config.max_reply_tokens} tokens, {_minutes(estimate.evaluate_s)} for the evaluation; the fits come on top"
    )
    run.say(
        f"[bold]Memory[/] {_mib(estimate.model_bytes)} for the model, about {_mib(estimate.states_bytes)} for hidden "
        f"states; {_mib(estimate.free_bytes)} are free on the disk"
    )
    if estimate.states_bytes > estimate.free_bytes:
        raise OutputError(
            f"{str(config.output)!r} has {_mib(estimate.free_bytes)} of free space; the run stores about "
            f"{_mib(estimate.states_bytes)}",
            hint="free some, name another folder, or lower --max-replies",
        )
    return estimate


def _estimate(run: Run) -> Estimate:
    config, method = run.config, run.plan.method
    generate_s, states_a_reply = _tried(run)
    given = [reply for data in (run.plan.train, run.plan.held_out) for reply in given_replies(run, data)[0]]
    num_to_read = 0 if method.keeps_candidates or run.plan.source == "reward" else len(given)
    read_s = _seconds_to_read(run, given) if num_to_read else 0.0
    num_to_generate = _num_to_generate(run)
    held_out = {(row.prompt, row.tools) for row in run.plan.prompts[1].rows}
    num_evaluated = 2 * min(len(held_out), config.eval_prompts)
    return Estimate(
        replies=num_to_generate + num_to_read,
        collect_s=num_to_generate * generate_s + num_to_read * read_s,
        evaluate_s=num_evaluated * generate_s,
        model_bytes=weight_bytes(run.model.model),
        states_bytes=int(2 * (num_to_generate + num_to_read) * states_a_reply * run.model.hidden_size),
        free_bytes=_free_bytes(config.output),
    )


def _num_to_generate(run: Run) -> int:
    """Return the number of replies of base model and gate, as far as it is known: rounds may end early."""
    config, plan = run.config, run.plan
    if plan.method.name == "sac":
        return run.max_replies
    if plan.method.keeps_candidates:
        is_partial = plan.reward is None or uses_partial_text(run)  # a fitted reward model scores partial text
        fitted, held_out = (len(side.prompts) * side.replies_per_prompt for side in prompt_sides(run, is_partial))
        rounds = num_rounds(run, is_partial)
        if plan.method.form == "q":  # rounds are sampled and greedy, and greedy replies are looked at in the end
            greedy = 2 * len(prompt_sides(run, is_partial)[1].prompts) if config.kl_budget is None else 0
            return fitted + 2 * rounds * (fitted // 4) + (2 + rounds) * held_out + greedy
        return fitted + rounds * (fitted // 4) + (2 + rounds) * held_out
    if plan.source not in ("reward", "rule"):
        return 0
    counts = [len(limited_prompts(run, data)) for data in (plan.train, plan.held_out)]
    corrections = config.correction_rounds if plan.source == "rule" else 0
    each = replies_per_prompt(run) if plan.source == "reward" else min(2, replies_per_prompt(run))
    if plan.source == "rule" and plan.method.form == "q":  # corrections are sampled and greedy; damage is looked at
        return counts[0] * (each + 2 * corrections) + counts[1] * (2 * each + corrections)
    return sum(count * (each + corrections) for count in counts)


def _tried(run: Run) -> tuple[float, float]:
    """Return the seconds for one reply of several generated at once, and the number of states it leaves."""
    prompts = distinct_prompts(run, run.plan.prompts[0])[:_TRIED_REPLIES]
    sampling = run.sampling(max_new_tokens=min(_TRIED_TOKENS, run.config.max_reply_tokens))
    head = run.new_head().eval() if run.plan.method.keeps_candidates else None
    began = time.perf_counter()
    replies = RolloutBatch(prompts, sampling, run.config.seed, head=head).generate(run.model, run.backend)
    longer = run.config.max_reply_tokens / sampling.max_new_tokens
    states = sum(len(reply.states) + sum(len(p.states) for p in reply.positions) for reply in replies)
    return (time.perf_counter() - began) * longer / len(prompts), states * longer / len(prompts)


def _seconds_to_read(run: Run, given: list[GivenReply]) -> float:
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
