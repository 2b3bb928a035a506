"""The constructor arguments that `MARALLM` and `ChatMARA` share, and how a call's settings override them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, field_validator
from typing_extensions import Self

from mara_integrations.errors import ConfigError, MaraError
from mara_integrations.heads.source import head_fingerprint, head_name, head_weights
from mara_integrations.models.load import LoadedModel, ModelSpec
from mara_integrations.models.options import Quantization
from mara_integrations.replies.forms import ReplyForm
from mara_integrations.runtime import MARAEngine
from mara_integrations.sampling import Fallback, GateParams, SamplingParams, Selection

_SPEC = ("model", "device", "dtype", "revision", "model_kwargs", "quantization")
_GATE = ("strength", "selection", "fallback", "trace")
_SAMPLING = ("temperature", "top_k", "top_p", "max_tokens", "stop", "seed")
_REQUEST = ("head", "system_prompt", *_GATE, *_SAMPLING)


# Code written for hosted models passes these to every model; a local one has nothing to do with them.
_OF_HOSTED_MODELS = {"api_key", "base_url", "timeout", "max_retries", "streaming"}


class EngineSettings(BaseModel):
    """Keyword arguments of a gated local model. None means what the head was trained with, else the engine's default.

    Attributes:
        model: Hub id, local folder, `.gguf` file, alias, or a loaded `(model, tokenizer)`; the only positional one.
        head: A head, its folder, a published `.pth` actor, or a Hub id; None is the base model. Several, as a list or a
            mapping to weights, are composed: their corrections of the base model add.
        strength: Dial on the head, 0 is the base model.
        selection: See `GateParams`.
        fallback: See `GateParams`.
        top_k: See `SamplingParams`.
        top_p: See `SamplingParams`.
        temperature: 0 is greedy.
        max_tokens: Upper bound of a reply; `max_new_tokens` is understood too.
        stop: Strings that end a reply.
        seed: Makes sampling repeatable.
        system_prompt: Put before every conversation that brings no system message.
        device: `auto` is CUDA, then MPS, then CPU.
        dtype: `auto` is what the device is fast at.
        trace: Report what the gate saw and did at each position.
        revision: Of a model on the Hub.
        model_kwargs: Passed to `from_pretrained`, as for quantisation or `device_map`.
        quantization: `int8` is for the CPU: a quarter of the memory for linear layers, and faster.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    model: Any = "smollm2"
    head: Any = None
    strength: float | None = None
    selection: Selection | None = None
    fallback: Fallback | None = None
    top_k: int | None = None
    top_p: float | None = None
    temperature: float = 0.0
    max_tokens: int | None = None
    stop: list[str] | None = None
    seed: int | None = None
    system_prompt: str | None = None
    device: Any = "auto"
    dtype: Any = "auto"
    trace: bool = False
    revision: str | None = None
    model_kwargs: dict[str, Any] | None = None
    quantization: Quantization | None = None

    _engine: MARAEngine | None = PrivateAttr(default=None)

    def __init__(self, model: Any = "smollm2", **settings: Any) -> None:
        """Check the settings; nothing is looked up or loaded before the first use.

        Raises:
            ConfigError: If a setting is unknown or has a value that is not allowed.
        """
        settings = _in_our_words(settings)
        known = type(self).model_fields
        for name in sorted(settings.keys() - known.keys() - _OF_HOSTED_MODELS):
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{name}={settings[name]!r} is no setting of {type(self).__name__}",
                hint=f"did you mean {near[0]}?" if near else f"settings are {', '.join(EngineSettings.model_fields)}",
            )
        try:
            super().__init__(model=model, **settings)
        except ValidationError as error:
            raise _config_error(error) from None

    def model_post_init(self, context: Any, /) -> None:
        """Check the values against the bounds that requests have."""
        super().model_post_init(context)
        _checked(self._request_settings({}))

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("head")
    @classmethod
    def _is_a_head(cls, value: Any) -> Any:
        head_weights(value)
        return value

    @property
    def engine(self) -> MARAEngine:
        """The engine that runs the model; made anew when a field that names the model was changed."""
        spec = {name: getattr(self, name) for name in _SPEC}
        spec["model_kwargs"] = spec["model_kwargs"] or {}
        if self._engine is None or self._engine.spec != ModelSpec(**spec):
            self._engine = MARAEngine(head=self.head, **spec)
        return self._engine

    @property
    def model_name(self) -> str:
        """What the model is called, without loading it."""
        if isinstance(self.model, str | os.PathLike):
            return os.fspath(self.model)
        if isinstance(self.model, LoadedModel):
            return self.model.name
        model = self.model[0]
        return getattr(model.config, "_name_or_path", "") or type(model).__name__

    def load(self) -> Self:
        """Load model and head now instead of on first use; returns itself.

        Raises:
            ModelError: If the model can't be found or driven.
            HeadError: If the head can't be read or does not fit the model.
        """
        self.engine.load()
        return self

    def _request_settings(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of one request in the engine's words: those of the call, then ours; None is left to the engine."""
        call = dict(call)
        if call.pop("model", self.model_name) != self.model_name:
            raise ConfigError(
                "a call can't choose another model: it would have to be loaded", hint="make one object a model"
            )
        form = ReplyForm.of_call(call)
        call = {name: value for name, value in _in_our_words(call).items() if value is not None or name == "head"}
        values = {**{name: getattr(self, name) for name in _REQUEST}, **call}
        values.update(max_new_tokens=values.pop("max_tokens"), form=form if form != ReplyForm() else None)
        return {name: value for name, value in values.items() if value is not None or name == "head"}

    def _described(self) -> dict[str, Any]:
        """The settings as plain values, for traces and logs; without `model_kwargs`, which may hold an access token."""
        values = {name: getattr(self, name) for name in (*_SPEC, *_REQUEST) if name != "model_kwargs"}
        values.update(model=self.model_name, head=head_name(self.head), device=str(self.device), dtype=str(self.dtype))
        return values

    def _fingerprint(self, call: Mapping[str, Any]) -> str:
        """Differs for two calls that can answer differently, given the same prompt."""
        values = {**self._described(), **self._request_settings(call)}
        if not isinstance(self.model, str | os.PathLike):  # objects of one name may have different weights
            values["model"] = f"{self.model_name}@{id(self.model):x}"
        values["model_kwargs"] = sha256(repr(self.model_kwargs).encode()).hexdigest()
        return str(sorted({**values, "head": head_fingerprint(values["head"])}.items()))

    def __repr_args__(self) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in self._described().items() if value is not None]

    def __getstate__(self) -> dict[Any, Any]:
        if not isinstance(self.model, str | os.PathLike):
            raise ConfigError("a loaded model is not pickled", hint="name the model; each process loads it once")
        return super().__getstate__()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        memo.update({id(shared): shared for shared in (self.model, self.head)})  # weights are not copied with settings
        return super().__deepcopy__(memo)


def _in_our_words(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Both frameworks say `max_tokens`, the engine `max_new_tokens`: here both mean the same."""
    settings = dict(settings)
    if "max_new_tokens" in settings:
        settings["max_tokens"] = settings.pop("max_new_tokens")
    return settings


def _checked(values: Mapping[str, Any]) -> None:
    SamplingParams.of(**{name: value for name, value in values.items() if name in SamplingParams.model_fields})
    GateParams.of(**{name: value for name, value in values.items() if name in GateParams.model_fields})


def _config_error(error: ValidationError) -> MaraError:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, MaraError):
        return cause
    name = str(first["loc"][0]) if first["loc"] else error.title
    return ConfigError(f"{name}={first['input']!r} is not allowed: {first['msg'].lower()}")
