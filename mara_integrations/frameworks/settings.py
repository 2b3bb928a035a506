"""The constructor arguments that `MARALLM` and `ChatMARA` share, and how a call's settings override them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr, ValidationError, field_validator
from typing_extensions import Self

from mara_integrations.engine.limits import EngineLimits
from mara_integrations.engine.settings import unknown_setting
from mara_integrations.errors import ConfigError, MaraError
from mara_integrations.heads.source import head_fingerprint, head_name, head_weights
from mara_integrations.models.load import LoadedModel, ModelSpec
from mara_integrations.models.options import EngineName, Quantization
from mara_integrations.remote.connection import Address
from mara_integrations.remote.engine import ServerEngine
from mara_integrations.replies.forms import ReplyForm
from mara_integrations.runtime import MARAEngine
from mara_integrations.sampling import Fallback, Selection, describe

_SPEC = ("device", "dtype", "revision", "model_kwargs", "quantization")
_GATE = ("strength", "selection", "fallback", "trace")
_SAMPLING = ("temperature", "top_k", "top_p", "min_candidates", "max_tokens", "stop", "never", "seed")
_REQUEST = ("head", "system_prompt", *_GATE, *_SAMPLING)
_TOLD = ("device", "dtype", "revision", "quantization", "engine_name", "base_url", *_REQUEST)

# Code written for hosted models passes these to every model; one in this process has nothing to do with them.
OF_SERVERS = ("api_key", "max_retries", "timeout")
_OF_HOSTED_MODELS = (*OF_SERVERS, "streaming")

# Fields that say what `SamplingParams` and `GateParams` say take their help from there.
_AS_TRAINED = "None is what the head was trained with, "
_MAX_TOKENS = (
    "Default: 512. `max_new_tokens` is another name for it. A reply that it cuts has the `finish_reason` length."
)


class EngineSettings(BaseModel):
    """Keyword arguments of a gated model, and what follows from them.

    ```python
    llm = MARALLM("smollm2", head="heads/brand-voice", temperature=0.7, max_tokens=100)
    llm = MARALLM(head="org/brand-voice")  # the model that the head was trained on
    llm = MARALLM((model, tokenizer), head={"heads/voice": 1.0, "heads/safety": 0.5})
    llm = MARALLM("smollm2", head="brand", base_url="http://127.0.0.1:8000")  # the model and the head of a server
    ```

    What a call says goes before these settings, and these before what the head was trained with; see
    `resolve_settings`. Nothing is looked up or loaded before the first use, or `load`. Fields can be assigned at any
    time, and hold from the next call on.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, use_attribute_docstrings=True)

    model: Any = None
    """Hub id, local folder, `.gguf` file, alias, or a loaded `(model, tokenizer)`. None is the model that the head was
    trained on."""
    head: Any = None
    """A head, its folder, a published `.pth` actor, or a Hub id; None is the base model. Several, as a list or a
    mapping to weights, are composed: their corrections of the base model add."""
    strength: float | None = Field(None, description=describe("strength"))
    selection: Selection | None = Field(None, description=describe("selection", "Default: auto."))
    fallback: Fallback | None = Field(None, description=describe("fallback", "Default: first."))
    top_k: int | None = Field(None, description=describe("top_k", _AS_TRAINED + "else 40."))
    top_p: float | None = Field(None, description=describe("top_p", _AS_TRAINED + "else 0.95."))
    min_candidates: int | None = Field(None, description=describe("min_candidates", _AS_TRAINED + "else 1."))
    temperature: float = Field(0.0, description=describe("temperature"))
    max_tokens: int | None = Field(None, description=describe("max_new_tokens", _MAX_TOKENS))
    stop: list[str] | None = Field(None, description=describe("stop"))
    never: list[str] | None = Field(None, description=describe("never", "A call adds to them, and lifts none."))
    seed: int | None = Field(None, description=describe("seed", "None draws fresh random numbers for each call."))
    system_prompt: str | None = None
    """Text put before every conversation that brings no system message. None is the one that the head was trained with;
    an empty text turns it off."""
    device: Any = "auto"
    """Device of the model; `auto` is CUDA, then MPS, then CPU."""
    dtype: Any = "auto"
    """Number format of the model; `auto` is what the device is fast at."""
    trace: bool = Field(False, description=describe("trace"))
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub."""
    model_kwargs: dict[str, Any] | None = None
    """Arguments for `from_pretrained`, as for quantisation or `device_map`; for llama.cpp `n_ctx`, `n_gpu_layers` and
    `n_threads`; for vLLM its engine arguments, as `max_model_len`."""
    quantization: Quantization | None = None
    """Format of the weights of linear layers; `int8` is for the CPU: a quarter of the memory, and faster."""
    engine_name: EngineName | Literal["server"] = "auto"
    """What runs the model, given as `engine=`: `transformers`, `llama.cpp` for `.gguf` files in their own quantisation,
    `vllm` for vLLM in this process, or `server`. `auto` is the server with a `base_url`, llama.cpp for a `.gguf` file
    that is named by its path where llama.cpp is installed, else transformers; `engine.runs_on` tells which."""
    limits: EngineLimits | None = None
    """How much memory and work the engine takes on, as `EngineLimits` or a mapping of its fields."""

    base_url: str | None = None
    """Address of a server that runs the model, as `http://127.0.0.1:8000`: `mara-tools serve`, or `vllm serve` with our
    plug-in. The model and the head are then names that it knows. `engine="server"` alone takes `OPENAI_BASE_URL`."""
    api_key: SecretStr | None = Field(None, exclude=True)
    """The server's key. None is `MARA_API_KEY`, else `OPENAI_API_KEY`."""
    timeout: float | None = Field(None, gt=0)
    """Seconds to wait for the server, and between two parts of its answer. Default: 600."""
    max_retries: int | None = Field(None, ge=0)
    """How often a server that is overloaded or can't be reached is asked again. Default: 2."""

    _engine: MARAEngine | None = PrivateAttr(default=None)

    def __init__(self, model: Any = None, **settings: Any) -> None:
        """Check the settings; nothing is looked up or loaded before the first use.

        Raises:
            ConfigError: If a setting is unknown or has a value that is not allowed, or neither a model nor a head is
                named.
        """
        settings = _in_our_words(settings)
        known = type(self).model_fields
        is_local = settings.get("base_url") is None and settings.get("engine_name") != "server"
        ignored = [
            name
            for name in sorted(_OF_HOSTED_MODELS)
            if (is_local and name in OF_SERVERS and settings.get(name) is not None)
            or (name in settings and name not in known)
        ]
        for name in sorted(settings.keys() - known.keys() - {*ignored}):
            raise unknown_setting(name, settings[name], [*known], f" of {type(self).__name__}")
        if ignored:
            warnings.warn(
                f"{', '.join(ignored)} of {type(self).__name__}: without effect, the model runs in this process",
                stacklevel=2,
            )
        settings = {name: value for name, value in settings.items() if name not in ignored}
        try:
            super().__init__(model=model, **settings)
        except ValidationError as error:
            raise _config_error(error) from None

    def model_post_init(self, context: Any, /) -> None:
        """Check the values against the bounds that requests have."""
        super().model_post_init(context)
        self._new_engine()

    @field_validator("stop", "never", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("model")
    @classmethod
    def _is_a_model(cls, value: Any) -> Any:
        if value is not None:
            ModelSpec(value)
        return value

    @field_validator("head")
    @classmethod
    def _is_a_head(cls, value: Any) -> Any:
        head_weights(value)
        return value

    @property
    def engine(self) -> MARAEngine:
        """Return the engine with these settings, for `verify`, `evaluate`, raw text and token ids.

        It answers as this object does. After a field has changed it is another one, on the same loaded model unless a
        field that names the model was changed.
        """
        engine = self._engine
        if engine is None or self._names_another_model(engine):
            self._engine = self._new_engine()
        elif engine.defaults != (settings := self._defaults()):
            self._engine = engine.with_settings(**settings)
        assert self._engine is not None
        return self._engine

    def _names_another_model(self, engine: MARAEngine) -> bool:
        address = self._address()
        if address is not None or isinstance(engine, ServerEngine):
            is_same = isinstance(engine, ServerEngine) and engine.address == address
            return not is_same or engine.model_source != self.model
        if self.model is None:
            return engine.model_source is not None or engine.head_source != self.head
        spec = self._spec()
        spec["model_kwargs"] = spec["model_kwargs"] or {}
        return engine.model_source is None or (engine.spec, engine.limits) != (
            ModelSpec(self.model, **spec),
            self.limits,
        )

    def _new_engine(self) -> MARAEngine:
        if (address := self._address()) is not None:
            return ServerEngine(address, self.model, **self._defaults())
        return MARAEngine(self.model, **self._spec(), limits=self.limits, **self._defaults())

    def _address(self) -> Address | None:
        """Return the address of the server that runs the model; None where it runs in this process.

        Raises:
            ConfigError: If the address is missing or none, or a field says how the model is loaded.
        """
        if self.base_url is None and self.engine_name != "server":
            return None
        url = self.base_url or os.environ.get("OPENAI_BASE_URL")
        if url is None:
            raise ConfigError("engine='server', but no address is given", hint="base_url='http://127.0.0.1:8000'")
        if self.engine_name not in ("auto", "server"):
            raise ConfigError(
                f"engine={self.engine_name!r} runs the model in this process, and base_url={url!r} names a server",
                hint="leave one of them out",
            )
        for name in (*_SPEC, "limits"):
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ConfigError(
                    f"{name}={value!r} says how a model is loaded, and {url} has loaded it",
                    hint=f"leave {name} out, or give it to `mara-tools serve`",
                )
        key = None if self.api_key is None else self.api_key.get_secret_value()
        return Address.of(url, key, self.timeout, self.max_retries)

    def _spec(self) -> dict[str, Any]:
        """Return the settings that say how the model is loaded, under the engine's names."""
        return {**{name: getattr(self, name) for name in _SPEC}, "engine": self.engine_name}

    def _defaults(self) -> dict[str, Any]:
        """Return the settings of requests, under the engine's names."""
        return {name: getattr(self, name) for name in _REQUEST}

    @property
    def model_name(self) -> str:
        """Return the name of the model, without loading it.

        Raises:
            ConfigError: If no model is named, and the head records none.
            HeadError: If no model is named, and the head can't be read.
        """
        model = self.engine.spec.model if self.model is None else self.model
        if isinstance(model, str | os.PathLike):
            return os.fspath(model)
        if isinstance(model, LoadedModel):
            return model.name
        return getattr(model[0].config, "_name_or_path", "") or type(model[0]).__name__

    def load(self) -> Self:
        """Load model and head now instead of on first use; returns itself.

        Raises:
            ModelError: If the model can't be found or driven.
            HeadError: If the head can't be read or does not fit the model.
        """
        self.engine.load()
        return self

    def close(self) -> None:
        """Give back the memory of model, caches and decoder thread; later calls raise `EngineClosedError`.

        Copies of this object share its engine, and end with it.
        """
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call_settings(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of one call under the engine's names, without those that say nothing of decoding."""
        call = dict(call)
        if "model" in call and (model := call.pop("model")) not in (None, self.model_name):
            raise ConfigError(
                f"model={model!r}: a call can't choose another model, it would have to be loaded",
                hint="make one object a model",
            )
        form = ReplyForm.of_call(call)
        return {**call, "form": form} if form != ReplyForm() else call

    @property
    def _is_named(self) -> bool:
        return self.model is None or isinstance(self.model, str | os.PathLike)

    def _described(self) -> dict[str, Any]:
        """Return the settings as plain values, for traces and logs, but for those that may hold a secret."""
        values = {name: getattr(self, name) for name in _TOLD}
        values.update(head=head_name(self.head), device=str(self.device), dtype=str(self.dtype))
        return {"model": None if self.model is None else self.model_name, **values}

    def _fingerprint(self, call: Mapping[str, Any]) -> str:
        """Return a text that differs for two calls which can answer one prompt differently."""
        values = {**self._described(), "model": self.model_name, **self.engine.given(**self._call_settings(call))}
        values["engine_name"] = self.engine.runs_on.name  # `auto` depends on what is installed
        if self.model is not None and not isinstance(
            self.model, str | os.PathLike
        ):  # objects of one name may have different weights
            values["model"] = f"{self.model_name}@{id(self.model):x}"
        values["model_kwargs"] = sha256(repr(self.model_kwargs).encode()).hexdigest()
        identify = head_fingerprint if self._address() is None else head_name  # of a server, the names are all we know
        return str(sorted({**values, "head": identify(values["head"])}.items()))

    def __repr_args__(self) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in self._described().items() if value is not None]

    def __getstate__(self) -> dict[Any, Any]:
        if not self._is_named:
            raise ConfigError("a loaded model is not pickled", hint="name the model; each process loads it once")
        return super().__getstate__()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        memo.update({id(shared): shared for shared in (self.model, self.head)})  # weights are not copied with settings
        return super().__deepcopy__(memo)


def _in_our_words(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings under the names of our fields; `engine` names what runs the model, and no attribute."""
    settings = dict(settings)
    if "engine" in settings:
        settings["engine_name"] = settings.pop("engine")
    if "max_new_tokens" in settings:
        settings["max_tokens"] = settings.pop("max_new_tokens")
    return settings


def _config_error(error: ValidationError) -> MaraError:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, MaraError):
        return cause
    name = str(first["loc"][-1]) if first["loc"] else error.title
    return ConfigError(f"{name}={first['input']!r} is not allowed: {first['msg'].lower()}")
