"""Training on a contrast of readings, which several methods share: how a round is fitted and measured, and the report.

Each method says which readings it takes; see `principle`, `teacher` and `grounding`. In rounds after the first one, see
`rounds`, the gated model's own replies are read like those of the base model, and are fitted beside them. A round is
measured by what the contrast, and each reward beside it, says of the head's replies to held-out prompts.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from typing_extensions import override

from mara_integrations.data import Row
from mara_integrations.evaluation.metrics import opinions
from mara_integrations.heads.head import MARAHead
from mara_integrations.rewards import Reward, Scores, reward_name
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import limited_prompts, replies_per_prompt
from mara_integrations.training.collect.rewards import score_replies
from mara_integrations.training.collect.workload import Generation, Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.learning.fit import Epoch, Targets
from mara_integrations.training.methods.beside_rewards import with_rewards
from mara_integrations.training.methods.q_learner import QHeadLearner
from mara_integrations.training.methods.q_regression import regress, standardised
from mara_integrations.training.methods.readings import Difference, Side
from mara_integrations.training.methods.rounds import HELD_OUT_SEED, PlannedRounds, PromptSide, train_in_rounds
from mara_integrations.training.scoring.held_out import compare_scored, report_comparison
from mara_integrations.training.scoring.prompt_baseline import MAX_PROMPTS, beside_the_prompt
from mara_integrations.training.scoring.q_scale import scale_of_quality

# Reads sides, and returns the difference between the readings of each.
Differences: TypeAlias = Callable[[Run, Sequence[Side]], list[Difference]]
ContrastReport: TypeAlias = Callable[[Run, MARAHead, Side], dict[str, Any]]


def report_table(run: Run, head: MARAHead, held_out: Side) -> dict[str, Any]:
    """Compare the head with the sentence of the plan as a system prompt; see `beside_the_prompt`."""
    return beside_the_prompt(run, head, held_out.prompts[: run.config.eval_prompts])


class ContrastLearner(QHeadLearner[Side]):
    """Fits Q-heads to what readings of replies differ by, and to what rewards say of the same candidates.

    Args:
        run: The run.
        head: An untrained head; it is fitted in place.
        differences: Reads replies.
    """

    def __init__(self, run: Run, head: MARAHead, differences: Differences) -> None:
        super().__init__(run, head)
        self._differences = differences

    @staticmethod
    def gets_replies(row: Row) -> bool:
        """Return whether the model replies to the prompt of a row, to have its replies read: to all, here."""
        return True

    @classmethod
    def prompt_sides(cls, run: Run) -> tuple[PromptSide, PromptSide]:
        """Return the prompts to fit on, and those held out."""
        seed, each = run.config.seed, replies_per_prompt(run)
        train, held_out = (
            PromptSide(data, limited_prompts(run, data, each, cls.gets_replies), each, first)
            for data, first in ((run.plan.train, seed), (run.plan.held_out, seed + HELD_OUT_SEED))
        )
        for side in (train, held_out):
            run.random().shuffle(side.prompts)  # the first ones, which the table takes, are to be like the others
        return train, held_out

    @override
    def gather(
        self, stage: str, side: PromptSide, head: MARAHead, *, is_base: bool = False, temperature: float = 1.0
    ) -> Side:
        each, seed = side.replies_per_prompt, side.seed
        replies = generate_replies(
            self.run, stage, side.prompts, each, seed, head, is_base=is_base, temperature=temperature
        )
        return Side.of(stage, side.prompts, replies)

    @override
    def fit(self, name: str, rounds: Sequence[Side], held_out_rounds: Sequence[Side]) -> None:
        """Fit q to the sum of what the contrast and the rewards say, in standard deviations."""
        sides = [Side.join(rounds), Side.join(held_out_rounds)]
        found = self.values(sides)
        positions = [side.positions for side in sides]
        if self.run.plan.reward is not None:
            positions, found = with_rewards(self.run, name, sides, found)
        history = self.fit_to(name, *standardised(positions, found))
        is_first = len(rounds) == 1  # later fits go on from what the first one taught
        if is_first and not any(epoch.held_out_loss < history[0].held_out_loss for epoch in history[1:]):
            self.run.say(f"  [yellow]{_learned_nothing(self.run)}[/]")

    def values(self, sides: Sequence[Side]) -> list[Tensor]:
        """Return what the contrast says of the candidates, in standard deviations, (P, K) a side."""
        return [each.values for each in self._differences(self.run, sides)]

    def fit_to(self, name: str, train: Targets, held_out: Targets) -> list[Epoch]:
        """Fit q to targets in standard deviations; return all epochs."""
        return regress(self.run, name, self.q_head, train, held_out)

    @override
    def gain(self, name: str, held_out: PromptSide, base: Side, gated: Side) -> float:
        """Return what contrast and rewards gain, by weight, each in its standard deviations among base replies.

        What counts is the gain at the scale that the head would keep in the end, which its own replies tell: there the
        KL budget may allow less than on base replies, and perplexity and variety have bounds. To first order, a gain
        grows with the scale.

        It is 0 where a run has one round alone: there is nothing to compare it with, and the replies are not read.
        """
        if not num_rounds(self.run):
            return 0.0
        run = self.run

        def scored(reward: Reward) -> tuple[Scores, Scores]:
            of_base, of_gated = (
                score_replies(run, held_out.data, held_out.prompts, side.generated, reward=reward)
                for side in (base, gated)
            )
            return of_base, of_gated

        of_base, of_gated = (each.opinions for each in self._differences(run, (base, gated)))
        weights = {each: of_base[each].weight for each in of_base if each in of_gated}
        scores = {each: (of_base[each].scores, of_gated[each].scores) for each in weights}
        for reward, weight in run.plan.weighted_rewards:
            weights[reward_name(reward)], scores[reward_name(reward)] = weight, scored(reward)
        judged = {each: scored(judge) for each, judge in run.plan.judges.items()}
        comparison = compare_scored(run, {**scores, **judged}, base.generated, gated.generated, self.head)
        report_comparison(run, name, comparison)
        scale = self.head.config.scale
        kept = min(self.scale_within_budget(gated), scale_of_quality(run, scale, base.generated, gated.generated))
        found = min(1.0, kept / scale) * sum(
            weight * gain_in_deviations(*scores[each]) for each, weight in weights.items()
        )
        run.log("gain", stage=name, deviations=found)
        run.say(
            f"  at the scale that is kept, {name} gains {found:+.2f} standard deviations of the base model's replies"
        )
        return found


def gain_in_deviations(base: Scores, gated: Scores) -> float:
    """Return by how many standard deviations of base replies' scores the mean of gated replies' is higher.

    Replies without a score on either side are left out; it is 0 where none is left.
    """
    of_base, of_gated, _ = opinions(base, gated)
    if not of_base:
        return 0.0
    return (statistics.fmean(of_gated) - statistics.fmean(of_base)) / (statistics.pstdev(of_base) or 1.0)


def train_on_contrast(learner: ContrastLearner, contrast: str, report: ContrastReport = report_table) -> MethodResult:
    """Fit q to what readings of replies differ by, in rounds, scale it, and report on the finished head.

    Args:
        learner: Holds the run and the untrained head.
        contrast: What the replies are read under beside their own prompts, for the metrics.
        report: Says what the head does to held-out replies, and returns it for the metrics.
    """
    run, head = learner.run, learner.head
    kl, held_out = train_in_rounds(learner, learner.prompt_sides(run), num_rounds(run))
    if run.plan.reward is not None:
        contrast = f"{contrast}, and what raises {reward_name(run.plan.reward)}"
    return MethodResult(kl_per_token=kl, metrics={"contrast": contrast, **report(run, head, held_out)})


def work_on_contrast(
    run: Run,
    rereadings: Callable[[Generation], list[Generation]],
    reporting: Workload | None = None,
    learner: type[ContrastLearner] = ContrastLearner,
) -> Workload:
    """Return what `train_on_contrast` will do if no round ends it early.

    Args:
        run: The run.
        rereadings: Returns which of some replies are read again.
        reporting: What the report will do; None is that of `report_table`.
        learner: Class that will fit the head.
    """
    reporting, rounds = reporting or work_of_table(run), num_rounds(run)
    planned = PlannedRounds.of(run, learner, learner.prompt_sides(run), rounds)
    read = planned.in_rounds if rounds else planned.base  # what the head wrote last is read to measure its round
    again = [*itertools.chain(*map(rereadings, read)), *reporting.rereadings]
    num_rewards = len(run.plan.weighted_rewards)
    num_fitted = sum(len(each) for number in range(rounds + 1) for each in planned.known(number))
    return Workload(
        [each for each in (*planned.generations, *reporting.generations) if len(each)],
        rereadings=[each for each in again if len(each)],
        fitted=num_fitted * (1 + num_rewards),  # a critic of each reward, and the head
        scored=sum(map(len, planned.known(rounds))) if num_rewards else 0,
    )


def work_of_table(run: Run) -> Workload:
    """Return what `report_table` will do: its replies are read with and without the sentence."""
    held_out = limited_prompts(run, run.plan.held_out)
    of_table = [Generation(held_out[: min(run.config.eval_prompts, MAX_PROMPTS)], is_gated=True)] * 8
    return Workload(of_table, rereadings=of_table * 2)


def _learned_nothing(run: Run) -> str:
    """Return a warning that the first fit taught the head nothing, and what would help."""
    has_sentence = run.plan.principle is not None and run.plan.source != "documents"  # where it is our own
    wording = ", or a plainer sentence, or the opposite of it (--against)" if has_sentence else ""
    return (
        "on held-out replies the head predicts no better than a constant: it learned nothing that holds for other "
        f"prompts. More replies (--max-replies) would help{wording}."
    )


def num_rounds(run: Run) -> int:
    """Return the largest number of rounds after the first one."""
    return run.config.rounds or 0
