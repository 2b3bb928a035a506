"""Settings of a request: how candidates are chosen (`SamplingParams`) and how the gate judges them (`GateParams`).

Torch-free, so that a command line can check its flags before anything heavy is imported.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from typing_extensions import Self

from mara_integrations.errors import ConfigError

Selection = Literal["auto", "first", "greedy", "sample"]
Fallback = Literal["first", "last", "best"]
HeadForm = Literal["paper", "residual", "value", "q"]

# Smaller temperatures overflow the logits and are greedy in all but name.
MIN_TEMPERATURE = 1e-4
# More than any vocabulary has tokens: larger values are mistakes.
MAX_TOP_K = 2_000_000
# A gate needs one alternative; a request for more than this would judge noise.
MAX_MIN_CANDIDATES = 1_000
MAX_STOPS, MAX_STOP_CHARS = 64, 1_000
MAX_NEVER, MAX_NEVER_CHARS = 1_000, 200


class Params(BaseModel):
    """Frozen settings that refuse unknown keys, with our error instead of pydantic's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Build from keyword arguments.

        Raises:
            ConfigError: If a value is out of bounds or a name is unknown; names the value and what is allowed.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            reason = first["msg"].removeprefix("Value error, ")
            raise ConfigError(
                f"{name}={first['input']!r} is not allowed: {reason[0].lower()}{reason[1:]}" if name else reason,
                hint=f"settings are {', '.join(cls.model_fields)}" if first["type"] == "extra_forbidden" else None,
            ) from None

    def updated(self, **values: Any) -> Self:
        """A copy with some values changed and everything checked again; see `of` for the errors."""
        return self.of(**{**self.model_dump(), **values}) if values else self


class SamplingParams(Params):
    """Settings of the candidates and of the reply's end; each field has its description."""

    max_new_tokens: int = Field(512, ge=1, le=1_000_000, description="Most tokens of the reply.")
    temperature: float = Field(
        0.0,
        ge=0.0,
        le=100.0,
        description="Temperature of sampling; 0 is greedy. Divides the logits before top-k and top-p.",
    )
    top_k: int = Field(40, ge=1, le=MAX_TOP_K, description="Number of most probable tokens that are candidates.")
    top_p: float = Field(
        0.95, gt=0.0, le=1.0, description="Smallest set of these candidates that holds this share of their probability."
    )
    min_candidates: int = Field(
        1,
        ge=1,
        le=MAX_MIN_CANDIDATES,
        description="Candidates kept whatever top-k and top-p say; 2 lets a gate refuse a lone candidate.",
    )
    stop: tuple[str, ...] = Field(
        (), max_length=MAX_STOPS, description="Text that ends the reply; it is not part of the reply."
    )
    never: tuple[str, ...] = Field(
        (),
        max_length=MAX_NEVER,
        description="Word or phrase that the reply never has: exactly, as a whole word, in any case; "
        "refund* also forbids refunds and all its other endings. re:PATTERN forbids what a regular expression matches, "
        "rule:NAME personal data (pii, or email, phone, card, iban), url, markdown or emoji.",
    )
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="Seed that makes sampling repeatable: one number for each position, whatever the gate does.",
    )

    @field_validator("stop", "never", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        if value is None:
            return ()
        return (value,) if isinstance(value, str) else tuple(value)

    @field_validator("stop")
    @classmethod
    def _of_sensible_length(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("a stop string can't be empty")
        if max(map(len, value), default=0) > MAX_STOP_CHARS:
            raise ValueError(f"a stop string has at most {MAX_STOP_CHARS} characters")
        return value

    @field_validator("never")
    @classmethod
    def _of_words(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(word.strip() for word in value):
            raise ValueError("a forbidden word can't be blank")
        if max(map(len, value), default=0) > MAX_NEVER_CHARS:
            raise ValueError(f"a forbidden word, phrase or pattern has at most {MAX_NEVER_CHARS} characters")
        return value

    @field_validator("temperature")
    @classmethod
    def _no_tiny_temperature(cls, value: float) -> float:
        if 0.0 < value < MIN_TEMPERATURE:
            raise ValueError(f"the temperature is 0, which is greedy, or at least {MIN_TEMPERATURE}")
        return value


class GateParams(Params):
    """Settings of the gate, which turns a head's scores into the token taken; each field has its description."""

    strength: float = Field(
        1.0,
        ge=0.0,
        le=1000.0,
        description="Dial on the head: 0 is the base model, 1 the strength that the head was trained to. At "
        "temperature 0 a head may bring a lower one, or a lower top-p that holds unless a strength is named: greedy "
        "replies repeat themselves sooner.",
    )
    selection: Selection = Field(
        "auto",
        description="Rule by which the gate takes a candidate. first takes the first accepted one, greedy the most "
        "probable one under the gate's own distribution, sample draws from that distribution. auto is first for heads "
        "of the paper's form, else greedy at temperature 0 and sample above.",
    )
    fallback: Fallback = Field(
        "first",
        description="Candidate that the rule first takes when all are rejected: the first (the published inference), "
        "the last (the paper's text) or the one with the best accept logit.",
    )
    trace: bool = Field(False, description="Whether to record what the gate saw and did at each position.")


def describe(name: str, more: str = "") -> str:
    """Return the help of a field of `SamplingParams` or `GateParams`, and what `more` says about it."""
    fields = {**SamplingParams.model_fields, **GateParams.model_fields}
    return f"{fields[name].description} {more}".strip()
