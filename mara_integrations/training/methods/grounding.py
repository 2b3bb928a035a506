"""The method `grounding`: a head that answers from the documents of a prompt, and says where they hold no answer.

Where they do, the base model reads its replies again without the documents: what these change in the log-probability of
every candidate is what the gate is to add, as much of it as the KL budget allows. Where they do not, the gate is to say
a given sentence, see `missing_answers`. q is fitted to both at once, so that the state before the first token has to
tell the two kinds of question apart. How far the head goes, and what its replies lose, counts where there is an answer.

Source: Shi et al. 2023, context-aware decoding (arXiv 2305.14739), whose contrast is the target where the documents are
the right ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from typing_extensions import override

from mara_integrations.data import Dataset, PromptRow, Row
from mara_integrations.data.documents import GROUNDED, question_alone
from mara_integrations.data.principles import under
from mara_integrations.engine.gate import weighted_log_probs
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Conversation
from mara_integrations.training.collect.prompts import conversation, limited_prompts
from mara_integrations.training.collect.workload import Reading, Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.learning.fit import Epoch, Targets
from mara_integrations.training.methods.contrast import (
    ContrastLearner,
    num_rounds,
    train_on_contrast,
    work_on_contrast,
)
from mara_integrations.training.methods.missing_answers import (
    Asked,
    choose_sentence,
    given_to,
    read_sentence,
)
from mara_integrations.training.methods.q_regression import POSITIONS_PER_STEP
from mara_integrations.training.methods.q_wanted import Wanted, fit_wanted
from mara_integrations.training.methods.readings import Difference, Side, as_generated, difference_of, read_as
from mara_integrations.training.scoring.prompt_baseline import beside_the_prompt
from mara_integrations.training.scoring.q_scale import kl_per_token
from mara_integrations.training.scoring.scale import largest_within


def train(run: Run, head: MARAHead) -> MethodResult:
    """Fit q to what documents change and to what is to be said without them, and compare the head with the prompt."""
    learner = GroundingLearner(run, head)

    def report(run: Run, head: MARAHead, _held_out: Side) -> dict[str, Any]:
        prompts = _prompts(run, run.plan.held_out, _is_answerable) + _prompts(run, run.plan.held_out, _is_unanswerable)
        run.random().shuffle(prompts)
        return {"missing_answer": learner.sentence, **beside_the_prompt(run, head, prompts[: run.config.eval_prompts])}

    return train_on_contrast(learner, "prompts without documents", report)


def work(run: Run) -> Workload:
    """Return what `train` will do."""
    sentence = _sentence(run)
    readings = [
        Reading(given_to(run, sentence, [each.prompt for each in _asked(run, data)])) for data in _datasets(run)
    ]
    planned = work_on_contrast(run, lambda generation: [generation], learner=GroundingLearner)
    num_fitted = planned.fitted + sum(map(len, readings)) * (1 + num_rounds(run))
    return replace(planned, readings=readings, fitted=num_fitted)


class GroundingLearner(ContrastLearner):
    """Fits Q-heads to what documents change where they hold the answer, and to a sentence where they do not."""

    def __init__(self, run: Run, head: MARAHead) -> None:
        super().__init__(run, head, differences)
        self.sentence = _sentence(run)  # one that can't be said is refused before anything is generated

    @staticmethod
    @override
    def gets_replies(row: Row) -> bool:
        return _is_answerable(row)

    @cached_property
    def along_sentence(self) -> tuple[Wanted, Wanted]:
        """What is wanted along the sentence, after prompts to fit on and after those held out."""
        train, held_out = (
            read_sentence(self.run, stage, self.sentence, _asked(self.run, data))
            for stage, data in zip(("sentence", "held-out sentence"), _datasets(self.run), strict=True)
        )
        return train, held_out

    @override
    def fit_to(self, name: str, train: Targets, held_out: Targets) -> list[Epoch]:
        """Fit the gate to the base model, changed as the documents change it, and to the sentence."""
        scale = _scale_of_targets(self.run, train)
        wanted, held_out_wanted = (
            Wanted.join([_changed(targets, scale), part])
            for targets, part in zip((train, held_out), self.along_sentence, strict=True)
        )
        return fit_wanted(self.run, name, self.q_head, wanted, held_out_wanted, batch_size=POSITIONS_PER_STEP)


def differences(run: Run, sides: Sequence[Side]) -> list[Difference]:
    """Return what documents change in the log-probability of each candidate of each side."""
    rows = {conversation(run, row): row for data in _datasets(run) for row in data.rows if isinstance(row, PromptRow)}

    def alone(prompt: Conversation) -> Conversation:
        return Conversation(question_alone(rows[prompt]), prompt.tools).with_system(run.config.system_prompt)

    return [
        difference_of(
            side,
            {"with documents": (as_generated(side), 1.0)},
            [read_as(run, side, "without documents", [alone(prompt) for prompt in side.prompts])],
        )
        for side in sides
    ]


def _scale_of_targets(run: Run, targets: Targets) -> float:
    """Return the scale at which targets, as scores, take the whole KL budget."""
    assert run.kl_budget is not None
    return largest_within(lambda scale: kl_per_token(targets.positions, targets.values, scale), run.kl_budget)


def _changed(targets: Targets, scale: float) -> Wanted:
    """Return what is wanted of a gate whose scores are the targets."""
    where = targets.positions
    return Wanted(where, weighted_log_probs(where.log_probs, targets.values, scale, where.live))


def _datasets(run: Run) -> tuple[Dataset, Dataset]:
    return run.plan.train, run.plan.held_out


def _sentence(run: Run) -> str:
    """Return what is to be said where documents hold no answer."""
    return choose_sentence(run, _prompts(run, run.plan.train, _is_unanswerable))


def _asked(run: Run, data: Dataset) -> list[Asked]:
    """Return prompts of both kinds; and once more under a sentence, since applications have system prompts, too."""
    plain = [
        Asked(prompt, is_kept is _is_answerable, has_replies=True)
        for is_kept in (_is_answerable, _is_unanswerable)
        for prompt in _prompts(run, data, is_kept)
    ]
    return plain + [replace(each, prompt=under(GROUNDED, each.prompt), has_replies=False) for each in plain]


def _prompts(run: Run, data: Dataset, is_kept: Callable[[Row], bool]) -> list[Conversation]:
    return limited_prompts(run, data, is_kept=is_kept)


def _is_answerable(row: Row) -> bool:
    assert isinstance(row, PromptRow)
    return bool(row.columns["answerable"])


def _is_unanswerable(row: Row) -> bool:
    return not _is_answerable(row)
