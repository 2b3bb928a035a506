"""Settings of rewards and judges."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from mara_integrations.sampling import Params
from mara_integrations.training.settings.identity_mark import OutsideIdentity


class RewardSettings(Params):
    """How replies are scored."""

    normalise_rewards: Annotated[
        bool, Field(description="Scale each of several rewards to mean 0 and deviation 1 before they are weighted.")
    ] = False
    reward_timeout_s: Annotated[
        float, Field(gt=0.0, description="Seconds that a reward may take for one batch."), OutsideIdentity()
    ] = 600.0
    max_judge_calls: Annotated[
        int,
        Field(
            ge=1,
            description="Calls that LLM judges may make before training stops. Their answers are kept: the same "
            "command goes on from there, with as many calls again.",
        ),
        OutsideIdentity(),
    ] = 5000  # more than a run of default settings makes, and few enough that a mistake does not ruin anybody
    partial_text: Annotated[
        bool | None,
        Field(
            description="Whether the reward can score unfinished replies. If so, rloo scores every beginning of a "
            "reply and every rejected candidate, some 100 texts a reply, and learns much more from each. Default: "
            "the reward's own attribute takes_partial_text, else no."
        ),
    ] = None
    judge: Annotated[
        tuple[str, ...],
        Field(
            description="Reward that is only reported, never trained on, in the notation of --reward. It shows what "
            "else changes in the replies. May be repeated."
        ),
    ] = ()

    @field_validator("judge", mode="before")
    @classmethod
    def _several_judges(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value or ()
