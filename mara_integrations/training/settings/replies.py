"""Settings of the replies that a head is trained on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mara_integrations.sampling import Params


class ReplySettings(Params):
    """How many replies there are, how long they are, and their candidates."""

    max_reply_tokens: Annotated[
        int, Field(ge=2, le=4096, description="Length at which replies are cut, given or generated, in tokens.")
    ] = 48
    max_replies: Annotated[
        int | None,
        Field(
            ge=8,
            description="Number of replies to generate in all; prompts beyond it are left out. Default: 640 for rloo "
            "and reward-model, 320 for principle, grounding and teacher, 1152 for sac, else 384.",
        ),
    ] = None
    replies_each: Annotated[
        int | None,
        Field(
            ge=1, le=64, description="Replies to generate to each prompt. Default: up to 4, as --max-replies allows."
        ),
    ] = None
    top_k: Annotated[
        int, Field(ge=1, description="Most probable tokens that are candidates at a position; recorded with the head.")
    ] = 40
    top_p: Annotated[
        float,
        Field(
            gt=0.0,
            le=1.0,
            description="Candidates are cut to the smallest set with this share of the probability; recorded with "
            "the head.",
        ),
    ] = 0.95
    min_candidates: Annotated[
        int | None,
        Field(
            ge=1,
            description="Candidates that are kept whatever --top-p cuts. Default: 2 for rule, so that a lone candidate "
            "can be rejected, else 1.",
        ),
    ] = None
