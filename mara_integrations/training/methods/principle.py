"""The method `principle`: a head from a sentence. No data, no reward, no judge.

The base model reads its own plain replies again with the sentence as a system prompt. q is fitted to what that changes
in the log-probability of every candidate, against a neutral sentence: what any system prompt changes is no part of it.
The opposite can stand in its place or beside it; it helps some sentences, and harms others. Sentences with weights are
read one by one, and what they change is added; so is what rewards say of the candidates, see `beside_rewards`.
"""

from __future__ import annotations

from collections.abc import Sequence

from mara_integrations.data.principles import NEUTRAL, under
from mara_integrations.heads.head import MARAHead
from mara_integrations.training.collect.workload import Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.methods.contrast import ContrastLearner, train_on_contrast, work_on_contrast
from mara_integrations.training.methods.readings import Difference, Side, difference_of, read_as
from mara_integrations.training.rollouts.rereading import Rereading
from mara_integrations.training.settings.methods import Contrast

CONTRASTS: dict[Contrast, str] = {
    "neutral": "a neutral sentence",
    "opposite": "the opposite",
    "both": "a neutral sentence and the opposite",
}


def train(run: Run, head: MARAHead) -> MethodResult:
    """Fit q to what the sentence changes, and compare the head with the sentence as a system prompt."""
    return train_on_contrast(ContrastLearner(run, head, differences), CONTRASTS[run.config.principle_contrast])


def work(run: Run) -> Workload:
    """Return what `train` will do."""
    return work_on_contrast(run, lambda planned: [planned] * (len(sentences(run)) + len(others(run))))


def differences(run: Run, sides: Sequence[Side]) -> list[Difference]:
    """Return what the sentence changes in the log-probability of each candidate of each side."""

    def read(side: Side, name: str, sentence: str) -> Rereading:
        return read_as(run, side, f"under {name}", [under(sentence, prompt) for prompt in side.prompts])

    return [
        difference_of(
            side,
            {f"under {name}": (read(side, name, text), weight) for name, (text, weight) in sentences(run).items()},
            [read(side, name, text) for name, text in others(run).items()],
        )
        for side in sides
    ]


def sentences(run: Run) -> dict[str, tuple[str, float]]:
    """Return the sentences to read replies under, each with its weight, by the name of its readings."""
    assert run.plan.principle is not None
    parts = run.plan.principle.parts
    return {"the sentence" if len(parts) == 1 else f"sentence {n}": part for n, part in enumerate(parts, start=1)}


def others(run: Run) -> dict[str, str]:
    """Return what the sentence is contrasted with, by the name of its readings."""
    assert run.plan.principle is not None
    found: dict[Contrast, str] = {"neutral": NEUTRAL, "opposite": run.plan.principle.against}
    chosen = run.config.principle_contrast
    return {CONTRASTS[name]: sentence for name, sentence in found.items() if chosen in (name, "both")}
