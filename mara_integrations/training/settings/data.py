"""Settings of how data are read, and how much of them is held out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from mara_integrations.data import Format
from mara_integrations.data.documents import CONTEXT, QUERY, is_template
from mara_integrations.sampling import Params
from mara_integrations.training.settings.identity_mark import OutsideIdentity


class DataSettings(Params):
    """How rows are read, and which are held out."""

    format: Annotated[
        Format,
        Field(description="Kind of the rows, or the platform they were exported from. auto goes by the columns."),
    ] = "auto"
    column: Annotated[
        tuple[str, ...],
        Field(
            description="Column of another name, such as prompt=question or label=stars>=4. In an export of LangSmith "
            "or Langfuse, label is the name of the feedback. May be repeated."
        ),
    ] = ()
    context_template: Annotated[
        str | None,
        Field(
            description="For grounding: the prompt of your application, with {context_str} where the documents stand "
            "and {query_str} for the question. Default: LlamaIndex's own."
        ),
    ] = None
    missing_answer: Annotated[
        str | None,
        Field(
            description="For grounding: what to say where the documents hold no answer. Each of its tokens has to be a "
            "candidate of the model, so words of your own prompt do best. Default: the first of a few English "
            "sentences that the model can say.",
        ),
    ] = None
    skip_bad_rows: Annotated[bool, Field(description="Leave out rows that can't be read, and report them.")] = False
    prompts: Annotated[
        Path | None,
        Field(
            description="For preferences: prompts that the model replies to as it trains, in any form of --data, where "
            "your application's prompts differ from those of the preferences."
        ),
        OutsideIdentity(),
    ] = None
    held_out: Annotated[
        float,
        Field(
            gt=0.0,
            lt=1.0,
            description="Share of the prompts that are held out: the head is not fitted on them. They decide when a "
            "fit stops, and the final evaluation uses them.",
        ),
    ] = 0.15
    eval_prompts: Annotated[
        int, Field(ge=0, description="Largest number of held-out prompts in the final evaluation; 0 skips it.")
    ] = 64

    @field_validator("missing_answer")
    @classmethod
    def _says_something(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("it says nothing")
        return None if value is None else value.strip()

    @field_validator("context_template")
    @classmethod
    def _has_places(cls, value: str | None) -> str | None:
        if value is not None and not is_template(value):
            raise ValueError(f"it needs {CONTEXT} once, and {QUERY}")
        return value
