"""Settings that say what is trained on what, and towards what."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from mara_integrations.sampling import Params
from mara_integrations.training.recipes import recipe_names, with_recipe
from mara_integrations.training.settings.identity_mark import OutsideIdentity

MethodName = Literal[
    "auto", "value", "dpo", "kto", "reward-model", "rloo", "rule", "sac", "principle", "grounding", "teacher"
]


class MainSettings(Params):
    """What most runs set: the model, the data, the wish, and where the head goes."""

    model: Annotated[str, Field(description="Base model: Hub id, folder, .gguf file or alias.")] = "smollm2"
    data: Annotated[
        Path | None,
        Field(
            description="Preference pairs, labelled replies or prompts: a JSONL, JSON, CSV or Parquet file, a folder "
            "saved by datasets, a Hub name such as org/name:train, or a mixture of several in a .yaml file. With "
            "--principle, --teacher or --recipe it may be left out: then prompts are used that come with the package."
        ),
        OutsideIdentity(),
    ] = None
    output: Annotated[Path, Field(description="Folder that the head is written to."), OutsideIdentity()]
    overwrite: Annotated[
        bool, Field(description="Replace a finished head in the output folder."), OutsideIdentity()
    ] = False
    recipe: Annotated[
        str | None,
        Field(
            description=f"Settings that come with the package: {', '.join(recipe_names())}. They hold where no other "
            "option or file says otherwise; mara-tools recipes NAME shows them."
        ),
    ] = None
    method: Annotated[
        MethodName,
        Field(
            description="Training method. auto takes teacher with --teacher, principle with --principle, rule with "
            "--forbid, rloo with --reward, grounding where prompts have a column context, reward-model from 300 "
            "preference pairs on, else value."
        ),
    ] = "auto"
    reward: Annotated[
        tuple[str, ...],
        Field(
            description="Function that scores replies which the model generates to the prompts: module:function with "
            "TRL's signature, hf:MODEL for a reward model, llm:PROVIDER:MODEL for a chat model that judges by a rubric "
            "(llm:openai:gpt-5-mini?rubric=rubric.md), or a built-in: length, regex, forbidden-words, json, "
            "sentiment, toxicity, language (that of the prompt), reading-level, ifeval, answered, admitted, or a rule "
            "such as no-pii. Arguments follow as in length?words=60, a weight as in sentiment=0.5. May be repeated; "
            "the weighted sum counts."
        ),
    ] = ()
    forbid: Annotated[
        tuple[str, ...],
        Field(
            description="What must not appear in replies: a word or phrase (refund, or refund* with all its endings), "
            "re:PATTERN, or a ready rule: rule:pii, email, phone, card, iban, url, markdown, emoji, long?words=60, "
            "hard-words?syllables=4, informal, flattery, refusal or missing-answer. May be repeated."
        ),
    ] = ()
    require: Annotated[
        tuple[str, ...],
        Field(
            description="What must appear in each reply, in the same notation. It is learned as a reward, and so is "
            "--forbid beside it. May be repeated."
        ),
    ] = ()
    principle: Annotated[
        tuple[str, ...],
        Field(
            description="Sentence that says how replies should be, as a system prompt would: the head is trained "
            "from it alone, or from it and a --reward that can score unfinished replies. May be repeated. Several are "
            "read together; if one has a weight, as in 'Be warm.=0.5', each is read by itself, and their effects are "
            "added by weight."
        ),
    ] = ()
    principle_file: Annotated[Path | None, Field(description="Text file with such sentences."), OutsideIdentity()] = (
        None
    )
    against: Annotated[
        str | None,
        Field(
            description="The opposite of the principle, in the same form. --contrast opposite derives one where there "
            "is none."
        ),
    ] = None
    teacher: Annotated[
        str | None,
        Field(
            description="Model that reads the base model's replies: the head learns what it makes more probable than "
            "the base model does. As --model, or a folder with a LoRA adapter of PEFT (extra peft). It needs the same "
            "vocabulary. With --principle it reads under the sentence, and the base model under a neutral one."
        ),
    ] = None
    teacher_base: Annotated[
        str | None,
        Field(
            description="Model that the teacher was tuned from: the head learns the difference of these two, and so "
            "carries a fine-tune over to another model of the same vocabulary."
        ),
    ] = None
    system_prompt: Annotated[
        str | None,
        Field(
            description="System prompt of your application. It is put before every prompt that has none, and recorded "
            "with the head."
        ),
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**31, description="Seed of everything random.")] = 0

    @property
    def reads_again(self) -> bool:
        """Whether training uses a principle or a teacher: a model then scores the base replies a second time."""
        return bool(self.principle) or self.principle_file is not None or self.teacher is not None

    @model_validator(mode="before")
    @classmethod
    def _from_recipe(cls, values: Any) -> Any:
        return with_recipe(values) if isinstance(values, dict) else values

    @field_validator("reward", "principle", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value or ()

    @field_validator("principle", "against")
    @classmethod
    def _not_blank(cls, value: Any) -> Any:
        if any(not text.strip() for text in ((value,) if isinstance(value, str) else value or ())):
            raise ValueError("a sentence is needed, such as 'Be warm and brief.'")
        return value

    @field_validator("system_prompt")
    @classmethod
    def _no_controls(cls, value: str | None) -> str | None:
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in set(value or "") - set("\n\r\t")):
            raise ValueError("control characters are not allowed")
        return value

    @model_validator(mode="after")
    def _one_wish(self) -> Self:
        if self.reward and self.forbid:
            raise ValueError("give either a reward or forbidden words, not both")
        if self.teacher is None and self.teacher_base is not None:
            raise ValueError(f"teacher_base={self.teacher_base!r} has no teacher: give both, or neither")
        if self.teacher is not None and self.forbid:
            raise ValueError("give either a teacher or forbidden words, not both")
        if self.reads_again and self.forbid:
            raise ValueError("give either a principle or forbidden words, not both")
        return self
