"""The config of a head: what it is, what it was trained on, and how."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mara_integrations.sampling import HeadForm

# Measured on SmolLM2-135M: features of 16 to 128 and hidden layers of 128 to 512 fit equally well.
Q_SIZES = (256, 64)


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
        scale: Factor of f, found by calibration to a KL budget. The user's `strength` multiplies it.
        top_k: Number of candidates it was trained with, the default of requests that name none.
        top_p: Probability mass of the candidates it was trained with, the default of requests that name none.
        min_candidates: Least number of candidates it was trained with, the default of requests that name none.
        method: Name of the training method.
        rewards: Descriptions of the rewards it was trained for.
        data_fingerprint: Hash of the training data.
        training: Settings of the training run.
        metrics: Final figures of the training run.
        weights_sha256: Hash of the weights file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[2] = 2
    form: HeadForm = "residual"
    hidden_size: int = Field(ge=1)
    inner_sizes: tuple[int, int] = (1024, 256)
    base_model: str | None = None
    scale: float = Field(1.0, gt=0.0)
    top_k: int = Field(40, ge=1)
    top_p: float = Field(0.95, gt=0.0, le=1.0)
    min_candidates: int = Field(1, ge=1)
    method: str | None = None
    rewards: tuple[dict[str, Any], ...] = ()
    data_fingerprint: str | None = None
    training: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    weights_sha256: str | None = None

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
