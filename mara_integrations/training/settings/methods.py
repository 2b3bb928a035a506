"""Settings that only some methods have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from mara_integrations.sampling import Params

Contrast = Literal["neutral", "opposite", "both"]


@dataclass(frozen=True, slots=True)
class TakenBy:
    """Annotation of a setting that these methods alone take."""

    methods: tuple[str, ...]


class MethodSettings(Params):
    """Settings of one method or a few."""

    contrast: Annotated[
        Contrast | None,
        Field(
            description="For principle: the prompt that the principle is contrasted with, a neutral sentence, its "
            "opposite, or both. The head learns the difference. The opposite helps where the principle is a mood, such "
            "as cheerful, and harms where it says what to do, such as to refuse. Default: both with --against, else "
            "neutral."
        ),
        TakenBy(("principle", "teacher")),
    ] = None
    rounds: Annotated[
        int | None,
        Field(
            ge=0,
            le=100,
            description="For rloo, reward-model, principle, teacher and grounding: rounds of training on the gated "
            "model's own replies, after the base model's. They end early when one does not help on held-out prompts. "
            "Default: 2 for rloo and reward-model where the reward scores whole replies, else 0.",
        ),
        TakenBy(("rloo", "reward-model", "principle", "teacher", "grounding")),
    ] = None
    correction_rounds: Annotated[
        int,
        Field(ge=0, le=10, description="For rule: rounds of training on what the gated model still gets wrong."),
        TakenBy(("rule",)),
    ] = 1
    beta: Annotated[
        float,
        Field(
            gt=0.0,
            description="For dpo and kto: strength of the pull towards the base model; smaller lets the head move "
            "further.",
        ),
        TakenBy(("dpo", "kto")),
    ] = 0.3
    competitors: Annotated[
        int,
        Field(
            ge=0,
            description="For dpo and kto, and heads of the residual form: better ranked candidates that are scored "
            "beside each token of a reply. 0 was as good as 8, in half the time.",
        ),
        TakenBy(("dpo", "kto")),
    ] = 0
    credit: Annotated[
        Literal["terminal", "postback", "prefix"] | None,
        Field(
            description="For sac: which decisions get a reply's reward: the last one (terminal), all (postback), or "
            "each the change of the reward at its token (prefix). Default: prefix where the reward scores partial "
            "text, else terminal."
        ),
        TakenBy(("sac",)),
    ] = None
    staleness: Annotated[
        int,
        Field(
            ge=0,
            le=64,
            description="For sac: rounds of 64 replies that may be generated ahead with an older head, so that "
            "several processes on Ray stay busy.",
        ),
        TakenBy(("sac",)),
    ] = 0

    def without_influence(self, method: str) -> list[str]:
        """Return a sentence about each of these settings that was changed and that a method does not take."""
        found = []
        for name, field in MethodSettings.model_fields.items():
            (taken_by,) = (mark.methods for mark in field.metadata if isinstance(mark, TakenBy))
            value: Any = getattr(self, name)
            if value != field.default and method not in taken_by:
                others = [", ".join(taken_by[:-1])] if len(taken_by) > 1 else []
                takers = f"{' and '.join([*others, taken_by[-1]])} {'do' if others else 'does'}"
                found.append(f"{name}={value!r} has no influence: method {method!r} does not take it; {takers}")
        return found
