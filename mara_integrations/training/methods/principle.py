"""The method `principle`: a head from a sentence. No data, no reward, no judge.

The base model reads its own plain replies again with the sentence as a system prompt. q is fitted to what that changes
in the log-probability of every candidate, against a neutral sentence: what any system prompt changes is no part of it.
The opposite can stand in its place or beside it; it helps some sentences, and harms others. Sentences with weights are
read one by one, and what they change is added; so is what rewards say of the candidates, see `beside_rewards`. Where
the head's replies are too much alike, it is fitted anew, to what prompts change, too, see `beside_prompts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from typing_extensions import override

from mara_integrations.data.principles import NEUTRAL, under
from mara_integrations.heads.head import MARAHead
from mara_integrations.training.collect.workload import Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.methods.beside_prompts import with_prompts
from mara_integrations.training.methods.contrast import ContrastLearner, num_rounds, train_on_contrast, work_on_contrast
from mara_integrations.training.methods.readings import Difference, Side, difference_of, read_as
from mara_integrations.training.methods.rounds import PlannedRounds
from mara_integrations.training.rollouts.rereading import Rereading
from mara_integrations.training.scoring.quality import quality_ratios
from mara_integrations.training.settings.methods import Contrast

# Replies with a smaller share of the base model's distinct pairs of tokens are too much alike. Above it, what prompts
# change costs a head more than it brings, measured on SmolLM2-135M; see the cookbook.
_MIN_DISTINCT_RATIO = 0.9

CONTRASTS: dict[Contrast, str] = {
    "neutral": "a neutral sentence",
    "opposite": "the opposite",
    "both": "a neutral sentence and the opposite",
}


def train(run: Run, head: MARAHead) -> MethodResult:
    """Fit q to what the sentence changes, and compare the head with the sentence as a system prompt."""
    learner = PrincipleLearner(run, head)
    result = train_on_contrast(learner, CONTRASTS[run.config.principle_contrast])
    if learner.keeps_to_prompts:
        contrast = f"{result.metrics['contrast']}, and what prompts themselves change"
        result = replace(result, metrics={**result.metrics, "contrast": contrast})
    return result


def work(run: Run) -> Workload:
    """Return what `train` will do."""
    readings, rounds = len(sentences(run)) + len(others(run)), num_rounds(run)
    planned = work_on_contrast(run, lambda generation: [generation] * readings, learner=PrincipleLearner)
    if run.config.kl_budget is not None:
        return planned
    again = PlannedRounds.of(run, PrincipleLearner, PrincipleLearner.prompt_sides(run), rounds)
    num_fitted = sum(map(len, again.base)) * (1 + len(run.plan.weighted_rewards))
    return replace(
        planned,
        generations=[*planned.generations, again.gated[0]],
        rereadings=[*planned.rereadings, *again.known(rounds)],
        fitted=planned.fitted + num_fitted,
    )


class PrincipleLearner(ContrastLearner):
    """Fits Q-heads to what a sentence changes, and to what prompts change where replies are too much alike.

    Attributes:
        keeps_to_prompts: Whether what prompts change is added to what the sentence changes; see `beside_prompts`.
    """

    def __init__(self, run: Run, head: MARAHead) -> None:
        super().__init__(run, head, differences)
        self.keeps_to_prompts = False
        self._untrained = {name: tensor.clone() for name, tensor in head.state_dict().items()}

    @override
    def values(self, sides: Sequence[Side]) -> list[Tensor]:
        found = super().values(sides)
        return with_prompts(self.run, sides, found) if self.keeps_to_prompts else found

    @override
    def fits_again(self, base: Side, gated: Side) -> bool:
        """Begin anew, and take in what prompts change, where replies are too much alike."""
        _, variety = quality_ratios(base.generated, gated.generated)
        is_wanted = self.run.config.kl_budget is None and len(base.prompts) > 1
        if not is_wanted or variety >= _MIN_DISTINCT_RATIO:
            return False
        self.run.say(
            f"  replies are too much alike (distinct pairs of tokens x {variety:.2f}): the head is fitted anew, to "
            "what the prompts change, too"
        )
        self.head.load_state_dict(self._untrained)
        self.keeps_to_prompts = True
        return True


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
