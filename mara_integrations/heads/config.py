"""The config of a head: what it is, what it was trained on, and how."""

from __future__ import annotations

import math
import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mara_integrations.fingerprints import same_model
from mara_integrations.sampling import HeadForm

# Measured on SmolLM2-135M: features of 16 to 128 and hidden layers of 128 to 512 fit equally well.
Q_SIZES = (256, 64)
MAX_WIDTH = 1 << 20  # of a layer; the widest models have 16,384
MAX_SCALE = 10_000.0
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
REWARD_MODEL: Final = "reward_model"  # kind of a reward whose file is kept beside the head


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("control characters are not allowed")
    return text


def _no_controls(text: str) -> str:
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in set(text) - set("\n\r\t")):
        raise ValueError("control characters are not allowed")
    return text


Text = Annotated[str, Field(max_length=100_000), AfterValidator(_no_controls)]
Name = Annotated[str, Field(max_length=1000), AfterValidator(_printable)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Width = Annotated[int, Field(ge=1, le=MAX_WIDTH)]


class RewardFile(BaseModel):
    """A reward model that a training fitted and kept beside the head, as the head's config describes it.

    Attributes:
        kind: Distinguishes it from the other descriptions of rewards.
        name: Name of the reward.
        file: File in the head's folder: always a plain name in `rewards/`.
        sha256: Hash of the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["reward_model"] = REWARD_MODEL
    name: Annotated[Name, Field(min_length=1)]
    file: Annotated[Name, Field(pattern=r"^rewards/[^./\\][^/\\]{0,200}\.safetensors$")]
    sha256: Sha256


class Origin(BaseModel):
    """The origin of a trained head.

    Attributes:
        date: Time when the training began, in UTC.
        command: Command that trains such a head; paths are cut to names.
        data: Name of the training data, without its folder.
        num_rows: Number of rows that the head was fitted on.
        num_held_out_rows: Number of rows that were held out.
        versions: Versions of this package, torch, transformers and Python.
        hashes: Hashes of data, reward and base model, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    date: Name
    command: Text
    data: Name
    num_rows: int
    num_held_out_rows: int
    versions: dict[Name, Name] = {}
    hashes: dict[Name, Name] = {}


class HeadConfig(BaseModel):
    """The contents of `head_config.json`.

    Attributes:
        format_version: Version of this format. Version 1 called `scale` "strength"; it is still read.
        form: `paper`: two classes, a candidate is accepted where class 1 wins. `residual`: the output f corrects the
            base model's hazard. `value`: f = V(candidate) - V(last token). `q`: scores a candidate by the state before
            it and its output embedding.
        hidden_size: Width d of the base model's hidden states.
        inner_sizes: Widths of the two hidden layers; of a `q` head, of the hidden layer and of the features that state
            and candidate are compared in.
        base_model: Name of the model it was trained on; None when unknown, as in published checkpoints.
        base_model_fingerprint: Fingerprint of that model, see `fingerprints`; tells it by its weights, not by its name.
        scale: Factor of f, found by calibration to a KL budget. The user's `strength` multiplies it.
        greedy_strength: `strength` of requests at temperature 0 that name none. Greedy decoding turns every lean into a
            choice, so it may bear less of a head than sampling does.
        greedy_top_p: Largest `top_p` of these requests; None is `top_p`. The smaller it is, the more often the base
            model's own choice is the only candidate, wherever that model is sure of it.
        top_k: Number of candidates it was trained with, the default of requests that name none.
        top_p: Probability mass of the candidates it was trained with, the default of requests that name none.
        min_candidates: Least number of candidates it was trained with, the default of requests that name none.
        system_prompt: System prompt it was trained with, the default of conversations that bring none.
        method: Name of the training method.
        rewards: Descriptions of the rewards it was trained for.
        principle: Sentence that says how replies should be, where it was trained from one; of several with weights, a
            line each.
        against: The opposite of that sentence.
        teacher: Name of the model that it was taught by.
        teacher_base: Name of the model that the teacher was compared with; None is the base model.
        data_fingerprint: Hash of the training data.
        origin: Where the head comes from.
        training: Settings of the training run.
        metrics: Final figures of the training run.
        weights_sha256: Hash of the weights file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[2] = 2
    form: HeadForm = "residual"
    hidden_size: Width
    inner_sizes: tuple[Width, Width] = (1024, 256)
    base_model: Name | None = None
    base_model_fingerprint: Name | None = None
    scale: float = Field(1.0, gt=0.0, le=MAX_SCALE)
    greedy_strength: float = Field(1.0, gt=0.0, le=1.0)
    greedy_top_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: int = Field(40, ge=1, le=MAX_WIDTH)
    top_p: float = Field(0.95, gt=0.0, le=1.0)
    min_candidates: int = Field(1, ge=1, le=MAX_WIDTH)
    system_prompt: Text | None = None
    method: Name | None = None
    rewards: tuple[dict[str, Any], ...] = ()
    principle: Text | None = None
    against: Text | None = None
    teacher: Name | None = None
    teacher_base: Name | None = None
    data_fingerprint: Name | None = None
    origin: Origin | None = None
    training: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    weights_sha256: Sha256 | None = None

    @model_validator(mode="before")
    @classmethod
    def _sizes_by_form(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("form") == "q" and "inner_sizes" not in values:
            values = {**values, "inner_sizes": Q_SIZES}
        return values

    @model_validator(mode="before")
    @classmethod
    def _from_version_1(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("format_version") == 1:
            values = {"scale" if name == "strength" else name: value for name, value in values.items()}
            values["format_version"] = 2
        return values

    def is_for_model(self, name: str | None, fingerprint: str | None) -> bool:
        """Return whether the head may have been trained on a model; False where it surely was trained on another.

        Fingerprints tell models apart; where one is missing, names do, as far as they can.

        Args:
            name: Name of the model.
            fingerprint: Fingerprint of the model; None where unknown.
        """
        is_same = same_model(self.base_model_fingerprint, fingerprint)
        if is_same is not None:
            return is_same
        return self.base_model is None or name is None or not _are_other_models(self.base_model, name)

    @field_validator("rewards")
    @classmethod
    def _reward_files_are_plain(cls, specs: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for spec in specs:
            if spec.get("kind") == REWARD_MODEL:
                try:
                    RewardFile.model_validate(spec)
                except ValidationError as error:
                    first = error.errors()[0]
                    raise ValueError(f"{'.'.join(map(str, first['loc']))} of a reward model: {first['msg']}") from None
        return specs

    @field_validator("rewards", "training", "metrics")
    @classmethod
    def _numbers_are_finite(cls, value: Any) -> Any:
        todo = [value]
        while todo:
            match todo.pop():
                case float() as number if not math.isfinite(number):
                    raise ValueError("numbers have to be finite")
                case dict() as mapping:
                    todo += mapping.values()
                case list() | tuple() as items:
                    todo += items
        return value


def _are_other_models(one: str, other: str) -> bool:
    """Return whether two names are surely of different models: two ids of the Hub, or two folders that exist.

    A folder or a file may hold a copy of any model.
    """
    if one == other:
        return False
    are_here = [Path(name).exists() for name in (one, other)]
    if all(are_here):
        return Path(one).resolve() != Path(other).resolve()
    return not any(are_here) and all(_HUB_ID.fullmatch(name) for name in (one, other))
