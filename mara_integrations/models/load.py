"""Loading a base model with its tokenizer. One loaded model is shared by all that name the same one.

Knows no heads, gates or decoding.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
import torch
import transformers
from transformers.distributed.configuration_utils import DistributedConfig

from mara_integrations.errors import ConfigError, MissingExtraError, ModelError
from mara_integrations.fingerprints import fingerprint
from mara_integrations.messages import PromptEncoder
from mara_integrations.models import experimental, ranks
from mara_integrations.models.devices import choose_device, choose_dtype
from mara_integrations.models.facts import context_window_of, device_of, eos_token_ids_of, vocab_size_of
from mara_integrations.models.gguf import converted, copy_of, is_gguf_copy
from mara_integrations.models.int8 import check_int8, quantize
from mara_integrations.models.llama_cpp.options import check_for_llama_cpp
from mara_integrations.models.options import EngineName, Quantization
from mara_integrations.models.quiet import quiet
from mara_integrations.models.resolve import check_reachable, first_line, is_cached, resolve
from mara_integrations.models.spreading import join_processes, spreads_model
from mara_integrations.models.vllm.options import check_for_vllm

_log = logging.getLogger(__name__)

# settings of from_pretrained that say where and how files are read: configuration and tokenizer need them too
_SOURCE_KWARGS = ("trust_remote_code", "token", "cache_dir", "subfolder", "local_files_only")


@dataclass(frozen=True)
class ModelSpec:
    """A base model as a user names it; nothing is looked up or loaded before `load_model`.

    Attributes:
        model: Hub id, local folder, `.gguf` file, alias, a loaded `(model, tokenizer)`, or a `LoadedModel`.
        device: `auto` is CUDA, then MPS, then CPU. A loaded model stays where it is.
        dtype: `auto` is bfloat16 on GPUs that have it, float16 on others, float32 on CPU, where bfloat16 is faster on
            processors with instructions for it (AVX512-BF16, AMX), and several times slower on others.
        revision: Branch, tag or commit on the Hub.
        model_kwargs: Arguments of `from_pretrained`, as `quantization_config` or `device_map`; for llama.cpp, fields of
            `LlamaCppOptions`; for vLLM, fields of its `EngineArgs`.
        quantization: `int8` is for the CPU: linear layers hold int8 weights.
        engine: Name of the engine that runs the model. `llama.cpp` runs `.gguf` files in their own quantisation. `vllm`
            runs vLLM in this process. `auto` is `transformers` here: engines resolve it before, see `choose_engine`.
    """

    model: Any
    device: str | torch.device = "auto"
    dtype: str | torch.dtype = "auto"
    revision: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    quantization: Quantization | None = None
    engine: EngineName = "auto"

    def __post_init__(self) -> None:
        """Refuse what can't be a model, or what its engine can't do, before anything is looked up.

        Raises:
            ConfigError: Names what was given.
        """
        if not isinstance(self.model, str | os.PathLike | tuple | list | LoadedModel):
            raise ConfigError(f"model={self.model!r} is not a base model", hint="a name, a path, or (model, tokenizer)")
        if self.engine not in get_args(EngineName):
            known = ", ".join(map(repr, get_args(EngineName)))
            raise ConfigError(f"engine={self.engine!r} is not allowed", hint=f"allowed: {known}")
        if self.engine == "llama.cpp":
            check_for_llama_cpp(self.model, self.dtype, self.quantization, self.revision, self.model_kwargs)
        if self.engine == "vllm":
            check_for_vllm(self.model, self.quantization, self.model_kwargs)


@dataclass(frozen=True, eq=False)  # compared by identity: it is a key of weak dictionaries
class LoadedModel:
    """A base model ready to run, with its tokenizer and sizes.

    Attributes:
        model: A causal language model of transformers, in evaluation mode; on llama.cpp a `LlamaCppModel`, on vLLM a
            `VLLMModel`.
        tokenizer: Its tokenizer.
        name: The Hub id where there is one (also of an alias), else the folder or file as it was given.
        revision: Commit on the Hub, where known.
        device: Device of the model's input.
        dtype: Number format of the weights that are not quantised.
        quantization: Name of our quantisation of the linear layers; None without.
        hidden_size: Width of the last layer's hidden state.
        vocab_size: Width of the logits.
        context_window: Most tokens of prompt and reply together.
        eos_token_ids: Tokens that end a reply, as in `generate` of transformers.
        encoder: Turns prompts into token ids.
        fingerprint: Fingerprint of sizes and weights, see `fingerprints`; None where the weights are spread.
        parts: The model in each of the processes that hold it together, see `ranks`; None where it is in this one.
        engine: What runs it.
        file_format: Quantisation of a file that runs as it is, such as `Q4_K`; None for models of transformers.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None
    device: torch.device
    dtype: torch.dtype
    quantization: Quantization | None
    hidden_size: int
    vocab_size: int
    context_window: int
    eos_token_ids: frozenset[int]
    encoder: PromptEncoder
    fingerprint: str | None = None
    parts: ranks.Shared[Any] | None = None
    engine: EngineName = "transformers"
    file_format: str | None = None

    @property
    def number_format(self) -> str:
        """Number format of most weights, in a word."""
        return self.file_format or self.quantization or str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True, eq=False)
class Outline:
    """A base model without its weights; see `LoadedModel` for the attributes."""

    tokenizer: Any
    context_window: int


_loaded: weakref.WeakValueDictionary[tuple[Any, ...], LoadedModel] = weakref.WeakValueDictionary()
# One lock, not one a model: from_pretrained sets process-wide state (default dtype, initialisers) while it works.
_loading = threading.RLock()
_adopting = threading.Lock()


def load_model(spec: ModelSpec) -> LoadedModel:
    """Load a base model, or return the one that is already loaded; it stays loaded as long as somebody holds it.

    A user's own `(model, tokenizer)` is taken as it is; it is only put into evaluation mode, since dropout would make
    decoding random.

    Raises:
        ConfigError: If device, dtype or quantization is unknown, or not available for this model on this machine; if
            the model is to be spread over processes, and only one runs; if that needs a GPU feature which is not turned
            on; or if `MARA_EXPERIMENTAL` names an unknown feature.
        ModelError: If the model can't be found, reached or read, or is not a causal language model.
        MissingExtraError: If a `.gguf` is to be read and the packages for it are absent.
    """
    if isinstance(spec.model, LoadedModel):
        return spec.model
    experimental.enabled_features()  # an unknown name is refused on every machine, before anything is read
    if isinstance(spec.model, tuple | list):
        return _adopt(spec)
    if spec.engine in ("llama.cpp", "vllm"):
        return _load_once(spec)
    if spec.quantization is not None:
        chosen = choose_device(spec.device)
        check_int8(spec.quantization, chosen, choose_dtype(spec.dtype, chosen), spec.model_kwargs)
    in_parts = spreads_model(spec.model_kwargs)
    if in_parts:
        join_processes(spec.model_kwargs, spec.device)
    device = choose_device("auto" if in_parts else spec.device)
    dtype = choose_dtype(spec.dtype, device)
    name, source = resolve(os.fspath(spec.model))
    settings = tuple(sorted((key, repr(value)) for key, value in spec.model_kwargs.items()))
    key = (source, spec.revision, device, dtype, spec.quantization, settings)
    found = _loaded.get(key)
    if found is None:
        with _loading:
            found = _loaded.get(key)
            if found is None:
                found = _load_parts(name, source, spec, dtype) if in_parts else _load(name, source, spec, device, dtype)
                _loaded[key] = found
    return found


def _load_once(spec: ModelSpec) -> LoadedModel:
    """Load a model with llama.cpp or vLLM, or return it as it is loaded already."""
    name, source = resolve(os.fspath(spec.model))
    if spec.engine == "llama.cpp" and not source.endswith(".gguf"):
        raise ConfigError(
            f"engine='llama.cpp' runs .gguf files, and model {name!r} is not one",
            hint="engine='transformers' runs it; many models have .gguf files on the Hub",
        )
    settings = tuple(sorted((key, repr(value)) for key, value in spec.model_kwargs.items()))
    key = (spec.engine, source, spec.revision, str(spec.device), str(spec.dtype), settings)
    with _loading:
        found = _loaded.get(key)
        if found is None:
            with quiet():
                found = _loaded[key] = _load_elsewhere(name, source, spec)
    return found


def _load_elsewhere(name: str, source: str, spec: ModelSpec) -> LoadedModel:
    """Load a model with llama.cpp or vLLM; what does so builds on this module, and needs other packages."""
    if spec.engine == "vllm":
        from mara_integrations.models.vllm.load import load_vllm

        return load_vllm(name, source, spec)
    from mara_integrations.models.llama_cpp.load import load_gguf

    return load_gguf(name, Path(source), spec)


def read_outline(spec: ModelSpec) -> LoadedModel | Outline:
    """Tokenizer and context window, read from small files where they lie on this disk; else the model is loaded.

    Raises:
        MaraError: See `load_model`.
    """
    if not isinstance(spec.model, str | os.PathLike) or "config" in spec.model_kwargs:
        return load_model(spec)
    if spec.engine in ("llama.cpp", "vllm"):
        return load_model(spec)
    _, source = resolve(os.fspath(spec.model))
    path, settings = Path(source), {**spec.model_kwargs, "local_files_only": True}
    if path.suffix == ".gguf":
        source = str(copy_of(path))
    elif not path.exists() and spec.revision is not None:
        settings["revision"] = spec.revision
    is_folder = Path(source).is_dir()
    if not is_folder and (path.suffix == ".gguf" or not is_cached(source, settings)):
        return load_model(spec)
    shared = {key: value for key, value in settings.items() if key in (*_SOURCE_KWARGS, "revision")}
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(source, **settings)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **shared)
    except Exception:  # `load_model` reports what is wrong, if anything is
        return load_model(spec)
    return Outline(tokenizer, context_window_of(config.get_text_config(), tokenizer))


def _adopt(spec: ModelSpec) -> LoadedModel:
    """Wrap a user's own objects; all callers that pass the same two share one `LoadedModel`."""
    if len(spec.model) != 2 or not hasattr(spec.model[0], "config") or not callable(spec.model[1]):
        parts = ", ".join(type(part).__name__ for part in spec.model) or "nothing"
        raise ModelError(
            f"model is a {type(spec.model).__name__} of {parts}",
            hint="a loaded model is given as (model, tokenizer), in this order",
        )
    model, tokenizer = spec.model
    device = device_of(model)
    if spec.device != "auto" and torch.device(choose_device(spec.device)) != device:
        raise ConfigError(f"device={str(spec.device)!r}, but the loaded model is on {device}", hint="move it yourself")
    if spec.dtype != "auto" and choose_dtype(spec.dtype, device) != model.dtype:
        raise ConfigError(f"dtype={str(spec.dtype)!r}, but the loaded model has {model.dtype}", hint="cast it yourself")
    if spec.model_kwargs or spec.revision or spec.quantization:
        raise ConfigError("revision, model_kwargs and quantization say how to load a model; this one is loaded already")
    key = (id(model), id(tokenizer))  # the entry holds both objects, so while it lives the ids are theirs
    with _adopting:  # nobody who brings a loaded model waits for another to be loaded
        found = _loaded.get(key)
        if found is None:
            name = getattr(model.config, "_name_or_path", "") or type(model).__name__
            found = _loaded[key] = _described(model.eval(), tokenizer, name, fingerprint(model))
    return found


def _load_parts(name: str, source: str, spec: ModelSpec, dtype: torch.dtype) -> LoadedModel:
    """Load the model in every process, a part of it in each."""
    loaded = ranks.shared(_load_part, name, source, spec, dtype)
    return replace(loaded.value, parts=ranks.shared(_model_of, loaded))


def _load_part(name: str, source: str, spec: ModelSpec, dtype: torch.dtype) -> LoadedModel:
    return _load(name, source, spec, choose_device("auto"), dtype)


def _model_of(loaded: LoadedModel) -> Any:
    return loaded.model


def _load(name: str, source: str, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    is_local = Path(source).exists()
    settings = dict(spec.model_kwargs)
    if spec.revision is not None and not is_local:
        settings["revision"] = spec.revision
    try:
        with quiet():
            if source.endswith(".gguf") and is_local:
                source = str(converted(Path(source)))
            if is_local or is_cached(source, settings):
                try:
                    return _read(name, source, spec, device, dtype, {**settings, "local_files_only": True})
                except OSError:
                    if is_local:
                        raise
                    _log.info("the cached copy of %s is not complete", name)
            check_reachable(name, settings)
            huggingface_hub.utils.enable_progress_bars()  # a download may take minutes
            return _read(name, source, spec, device, dtype, settings)
    except (ConfigError, ModelError, MissingExtraError):
        raise
    except torch.OutOfMemoryError as error:
        raise ModelError(f"model {name!r} does not fit the memory of {device}", hint="see model_kwargs") from error
    except Exception as error:  # transformers, the hub and the files may raise anything; the cause stays chained
        raise ModelError(f"model {name!r} can't be loaded: {first_line(error)}", hint=_load_hint(error)) from error


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
    in_parts = spreads_model(settings)
    if is_quantised and device.type != "cpu" and not in_parts:
        settings.setdefault("device_map", {"": device})  # packed weights can't be moved afterwards
    if hasattr(DistributedConfig, "tp_plan"):  # the older way's successor
        parallel = {key: settings.pop(key) for key in ("tp_plan", "tp_size") if key in settings}
        settings |= {"distributed_config": parallel} if parallel else {}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, **settings)
    identity = fingerprint(model, is_quantised=is_gguf_copy(source))  # before int8 rounds the weights
    if spec.quantization is not None:
        quantize(model)
    if "device_map" not in settings and not is_quantised and not in_parts:
        model.to(device)
    return _described(model.eval().requires_grad_(False), tokenizer, name, identity, spec.quantization)


def _described(
    model: Any, tokenizer: Any, name: str, identity: str | None, quantization: Quantization | None = None
) -> LoadedModel:
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings()
    window = context_window_of(config, tokenizer)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        revision=getattr(model.config, "_commit_hash", None),
        device=device_of(model),
        dtype=model.dtype,
        quantization=quantization,
        hidden_size=config.hidden_size,
        vocab_size=vocab_size_of(model),
        context_window=window,
        eos_token_ids=eos_token_ids_of(getattr(model, "generation_config", None), config, tokenizer),
        encoder=PromptEncoder(tokenizer, name=name, vocab_size=embedding.weight.shape[0], max_tokens=window),
        fingerprint=identity,
    )


def _load_hint(error: Exception) -> str | None:
    if isinstance(error, ImportError):
        return "install the package it names"
    if isinstance(error, TypeError) and "unexpected keyword" in str(error):
        return "model_kwargs (--model-kwargs) are arguments of from_pretrained; n_ctx and its like are for llama.cpp"
    return "is the copy complete? The cause is shown with --debug"
