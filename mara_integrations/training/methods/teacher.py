"""The method `teacher`: a head from a second model with the same vocabulary, which reads and never writes.

The teacher reads the base model's own plain replies again. q is fitted to the difference of the log-probabilities of
every candidate, the teacher's less the base model's; or less those of the model that the teacher was tuned from, so
that the head carries a fine-tune over to another model. With a sentence, the teacher reads under it, and the other
model under what the sentence is contrasted with, see `principle`. Each model reads prompts in its own chat template.

Source: Mitchell et al. 2023, emulated fine-tuning (arXiv 2310.12962), and Liu et al. 2024, proxy-tuning (arXiv
2401.08565), which add such a difference at decoding time, and run all models for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mara_integrations.data.principles import under
from mara_integrations.heads.head import MARAHead
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import limited_prompts, replies_per_prompt
from mara_integrations.training.collect.workload import Generation, Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.methods.contrast import (
    ContrastLearner,
    report_table,
    train_on_contrast,
    work_of_table,
    work_on_contrast,
)
from mara_integrations.training.methods.principle import CONTRASTS, others, sentences
from mara_integrations.training.methods.readings import Difference, Side, as_generated, difference_of, read_as
from mara_integrations.training.methods.rounds import HELD_OUT_SEED
from mara_integrations.training.rollouts.rereading import Rereading
from mara_integrations.training.teachers import Role, model_bytes


def train(run: Run, head: MARAHead) -> MethodResult:
    """Fit q to what the teacher makes of base replies, and report how far the head's own replies agree with it."""
    other = "the base model" if "teacher_base" not in run.teachers else "the model that it was tuned from"
    learner = ContrastLearner(run, head, differences)
    if run.plan.principle is None:
        return train_on_contrast(learner, other, _report_agreement)
    contrast = f"{other} under {CONTRASTS[run.config.principle_contrast]}"
    return train_on_contrast(learner, contrast, report_table)


def work(run: Run) -> Workload:
    """Return what `train` will do."""
    own = model_bytes(run.model, run.backend)

    def by(role: Role, planned: Generation) -> Generation:
        return replace(planned, relative_s=run.teachers[role].num_bytes / own)

    def by_other(planned: Generation) -> list[Generation]:
        if "teacher_base" in run.teachers:
            return [by("teacher_base", planned)]
        return [] if run.plan.principle is None else [planned]

    def rereadings(planned: Generation) -> list[Generation]:
        return [by("teacher", planned)] * len(_taught(run)) + by_other(planned) * len(_contrasted(run))

    if run.plan.principle is not None:
        return work_on_contrast(run, rereadings, work_of_table(run))
    if not run.config.eval_prompts:
        return work_on_contrast(run, rereadings, Workload())
    each = replies_per_prompt(run)
    gated = Generation(limited_prompts(run, run.plan.held_out, each), each, is_gated=True)
    return work_on_contrast(run, rereadings, Workload([gated], rereadings=[by("teacher", gated), *by_other(gated)]))


def differences(run: Run, sides: Sequence[Side]) -> list[Difference]:
    """Return by how much the teacher likes each candidate of each side better than the other model does."""
    taught = _taught(run)
    these = _readings(run, "teacher", sides, {name: sentence for name, (sentence, _) in taught.items()})
    those, aside = _others(run, sides), _ends_of_some(run)
    return [
        difference_of(
            side,
            {name: (read, weight) for (name, (_, weight)), read in zip(taught.items(), by_teacher, strict=True)},
            by_other,
            aside,
        )
        for side, by_teacher, by_other in zip(sides, these, those, strict=True)
    ]


def _taught(run: Run) -> dict[str, tuple[str | None, float]]:
    """Return the sentences that the teacher reads under, with weights, by the name of its readings."""
    if run.plan.principle is None:
        return {"by the teacher": (None, 1.0)}
    return {f"under {name} by the teacher": part for name, part in sentences(run).items()}


def _contrasted(run: Run) -> dict[str, str | None]:
    """Return the sentences that the other model reads under, by the name of its readings."""
    by_whom = " by its base model" if "teacher_base" in run.teachers else ""
    if run.plan.principle is None:
        return {by_whom.strip(): None}
    return {f"under {name}{by_whom}": sentence for name, sentence in others(run).items()}


def _readings(run: Run, role: Role, sides: Sequence[Side], asked: Mapping[str, str | None]) -> list[list[Rereading]]:
    """Return what a model makes of the replies of each side, under each sentence or, where it is None, without one."""
    with run.teachers[role].loaded() as reader:
        return [
            [read_as(run, side, name, _prompts(side, sentence), reader) for name, sentence in asked.items()]
            for side in sides
        ]


def _prompts(side: Side, sentence: str | None) -> Sequence[Any]:
    return side.prompts if sentence is None else [under(sentence, prompt) for prompt in side.prompts]


def _others(run: Run, sides: Sequence[Side]) -> list[list[Rereading]]:
    """Return what the teacher is compared with: readings of each side by the other model."""
    asked = _contrasted(run)
    if "teacher_base" in run.teachers:
        return _readings(run, "teacher_base", sides, asked)
    if run.plan.principle is None:
        return [[as_generated(side)] for side in sides]
    return [[read_as(run, side, name, _prompts(side, sentence)) for name, sentence in asked.items()] for side in sides]


def _ends_of_some(run: Run) -> list[int]:
    """Return the tokens that end the replies of some of the models, and mean nothing to the others."""
    ends = [run.model.eos_token_ids, *(teacher.eos_token_ids for teacher in run.teachers.values())]
    return sorted(frozenset.union(*ends) - frozenset.intersection(*ends))


def _report_agreement(run: Run, head: MARAHead, held_out: Side) -> dict[str, Any]:
    """Say how much better the teacher likes the head's replies than the other model does, in nats a token."""
    if not run.config.eval_prompts:
        return {}
    each, seed = replies_per_prompt(run), run.config.seed + HELD_OUT_SEED
    gated = generate_replies(run, "gated replies for the teacher", held_out.prompts, each, seed, head)
    sides = (held_out, Side.of("gated replies", held_out.prompts, gated))
    these, those = _readings(run, "teacher", sides, {"by the teacher": None}), _others(run, sides)
    base, own = (float((this[0].tokens - that[0].tokens).mean()) for this, that in zip(these, those, strict=True))
    run.say(
        f"[bold]Teacher[/] likes the replies to {len(held_out.prompts)} held-out prompts by {base:+.3f} nats a token "
        f"(base model) and {own:+.3f} (head) better than the model that it is compared with"
    )
    run.log("teacher agreement", prompts=len(held_out.prompts), base=base, head=own)
    return {"teacher_agreement": {"num_prompts": len(held_out.prompts), "base": base, "head": own}}
