"""What methods share that fit q to a contrast of readings: the base replies, the fit, the scale, the report.

Each method says which readings it takes; see `principle`, `teacher` and `grounding`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.rewards import reward_name
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import limited_prompts, replies_per_prompt
from mara_integrations.training.collect.workload import Generation, Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.learning.fit import Targets
from mara_integrations.training.methods.beside_rewards import with_rewards
from mara_integrations.training.methods.q_regression import regress
from mara_integrations.training.methods.readings import Side
from mara_integrations.training.rollouts.positions import Positions, all_scores
from mara_integrations.training.scoring.prompt_baseline import MAX_PROMPTS, beside_the_prompt
from mara_integrations.training.scoring.q_scale import (
    greedy_generations,
    hold_greedy_quality,
    hold_sampled_quality,
    kl_per_token,
    scale_within_budget,
)
from mara_integrations.training.scoring.scale import report_scale, set_scale

HELD_OUT_SEED = 500_000  # offset larger than any number of replies
_MAX_TARGET = 5.0  # standard deviations


# What q is fitted to on each side, centred under the base model, (P, K).
ContrastValues: TypeAlias = Callable[[Run, Sequence[Side]], list[Tensor]]
ContrastReport: TypeAlias = Callable[[Run, MARAHead, Side], dict[str, Any]]


def report_table(run: Run, head: MARAHead, held_out: Side) -> dict[str, Any]:
    """Compare the head with the sentence of the plan as a system prompt; see `beside_the_prompt`."""
    return beside_the_prompt(run, head, held_out.prompts[: run.config.eval_prompts])


def train_on_contrast(
    run: Run, head: MARAHead, values: ContrastValues, contrast: str, report: ContrastReport = report_table
) -> MethodResult:
    """Fit q to values of the candidates of base replies, scale it, and report on the finished head.

    Args:
        run: The run.
        head: The head, fitted in place.
        values: Returns the values.
        contrast: What the replies are read under beside their own prompts, for the metrics.
        report: Says what the head does to held-out replies, and returns it for the metrics.
    """
    assert isinstance(head, QHead)
    train_side, held_out = _base_sides(run)
    _fit(run, head, values, train_side, held_out)
    scale, seed = scale_within_budget(run, head, held_out.positions), run.config.seed + HELD_OUT_SEED
    set_scale(head, scale)
    replies = generate_replies(run, "held-out gated replies", held_out.prompts, 1, seed, head)
    gated = Positions.of(replies)
    # on its own replies, which lie further from the base model, the budget may allow less
    set_scale(head, min(scale, scale_within_budget(run, head, gated)))
    hold_sampled_quality(run, head, scale, held_out.replies, replies)
    hold_greedy_quality(run, head, held_out.prompts, seed)
    kl = kl_per_token(gated, all_scores(head, gated, run.backend.output_embeddings), head.config.scale)
    report_scale(run, head.config.scale, kl)
    if run.plan.reward is not None:
        contrast = f"{contrast}, and what raises {reward_name(run.plan.reward)}"
    return MethodResult(kl_per_token=kl, metrics={"contrast": contrast, **report(run, head, held_out)})


def work_on_contrast(
    run: Run, rereadings: Callable[[Generation], list[Generation]], reporting: Workload | None = None
) -> Workload:
    """Return what `train_on_contrast` will do.

    Args:
        run: The run.
        rereadings: Returns which of some base replies are read again.
        reporting: What the report will do; None is that of `report_table`.
    """
    reporting = reporting or work_of_table(run)
    seed, each = run.config.seed, replies_per_prompt(run)
    prompts = limited_prompts(run, run.plan.train, each)
    held_out = limited_prompts(run, run.plan.held_out)
    base = [
        Generation(prompts, each, seed, is_gated=True, is_base=True),
        Generation(held_out, 1, seed + HELD_OUT_SEED, is_gated=True, is_base=True),
    ]
    generations = [
        *base,
        Generation(held_out, is_gated=True),
        *greedy_generations(run, held_out, seed + HELD_OUT_SEED),
        *reporting.generations,
    ]
    again = [*itertools.chain(*map(rereadings, base)), *reporting.rereadings]
    num_replies, num_rewards = len(prompts) * each + len(held_out), len(run.plan.weighted_rewards)
    return Workload(
        [planned for planned in generations if len(planned)],
        rereadings=[planned for planned in again if len(planned)],
        fitted=num_replies * (1 + num_rewards),  # a critic of each reward, and the head
        scored=num_replies if num_rewards else 0,
    )


def work_of_table(run: Run) -> Workload:
    """Return what `report_table` will do: its replies are read with and without the sentence."""
    held_out = limited_prompts(run, run.plan.held_out)
    of_table = [Generation(held_out[: min(run.config.eval_prompts, MAX_PROMPTS)], is_gated=True)] * 8
    return Workload(of_table, rereadings=of_table * 2)


def _base_sides(run: Run) -> tuple[Side, Side]:
    """Return base replies to the prompts to fit on and to those held out, with all candidates."""
    untrained, seed = run.new_head().eval(), run.config.seed
    each = replies_per_prompt(run)
    sides = []
    for name, data, count, offset in (
        ("base replies", run.plan.train, each, 0),
        ("held-out base replies", run.plan.held_out, 1, HELD_OUT_SEED),
    ):
        prompts = limited_prompts(run, data, count)
        run.random().shuffle(prompts)  # the first ones, which the table takes, are to be like the others
        replies = generate_replies(run, name, prompts, count, seed + offset, untrained, is_base=True)
        sides.append(Side.of(name, prompts, replies))
    return sides[0], sides[1]


def _fit(run: Run, head: QHead, values: ContrastValues, train_side: Side, held_out: Side) -> None:
    """Fit q to the values, and to what rewards say of the same candidates, in standard deviations."""
    sides = (train_side, held_out)
    positions, found = [side.positions for side in sides], values(run, sides)
    if run.plan.reward is not None:
        positions, found = with_rewards(run, sides, found)
    spread = float(found[0][positions[0].live].std()) or 1.0
    targets = [
        Targets(where, (value / spread).clamp(-_MAX_TARGET, _MAX_TARGET))
        for where, value in zip(positions, found, strict=True)
    ]
    regress(run, "fit", head, *targets)
