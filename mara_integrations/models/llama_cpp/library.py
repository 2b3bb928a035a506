"""llama.cpp's C functions by ctypes: from llama-cpp-python where it is installed, else from the wheel of xllamacpp.

Two structures are passed by value, and llama.cpp changes their fields from month to month. llama-cpp-python declares
its own. Those of xllamacpp are declared here and compared with their known defaults before anything is called with
them, so that another layout is an error, not a crash.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import sys
from collections import deque
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_ubyte, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from mara_integrations.errors import MissingExtraError, ModelError

_log = logging.getLogger(__name__)

# Packages that carry the library, the preferred first.
PACKAGES = ("llama_cpp", "xllamacpp")
# Levels of llama.cpp's log as levels of ours; its information is of interest to its developers only.
_LEVELS = {3: logging.DEBUG, 4: logging.DEBUG}
_NUM_KEPT = 20  # lines of its log


class Batch(ctypes.Structure):
    """`struct llama_batch`, unchanged since 2024: the tokens of one forward."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class ModelParams(ctypes.Structure):
    """`struct llama_model_params` of xllamacpp 2026.10, with room for what later versions append."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        ("room", c_ubyte * 256),
    )


class ContextParams(ctypes.Structure):
    """`struct llama_context_params` of xllamacpp 2026.10, with room for what later versions append."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("unknown", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
        ("room", c_ubyte * 256),
    )


# Default parameters of the known layout; all fields that are not named here are 0.
MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True}
CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0,
    "yarn_beta_fast": -1.0,
    "yarn_beta_slow": -1.0,
    "defrag_thold": -1.0,
    "type_k": 1,
    "type_v": 1,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
}

# Fields that are set. Older releases of llama-cpp-python lack some, and Python would let them be set all the same.
_MODEL_FIELDS = ("n_gpu_layers",)
_CONTEXT_FIELDS = (
    *("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "pooling_type", "flash_attn_type"),
    *("type_k", "type_v", "embeddings", "kv_unified"),
)

_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_supports_gpu_offload": (c_bool, ()),
    "llama_model_free": (None, (c_void_p,)),
    "llama_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_model_n_ctx_train": (c_int32, (c_void_p,)),
    "llama_model_n_embd": (c_int32, (c_void_p,)),
    "llama_model_n_layer": (c_int32, (c_void_p,)),
    "llama_model_n_head": (c_int32, (c_void_p,)),
    "llama_model_n_head_kv": (c_int32, (c_void_p,)),
    "llama_model_has_encoder": (c_bool, (c_void_p,)),
    "llama_model_is_recurrent": (c_bool, (c_void_p,)),
    "llama_model_is_hybrid": (c_bool, (c_void_p,)),
    "llama_model_meta_val_str": (c_int32, (c_void_p, c_char_p, c_char_p, c_size_t)),
    "llama_n_ctx_seq": (c_uint32, (c_void_p,)),
    "llama_n_ctx": (c_uint32, (c_void_p,)),
    "llama_n_batch": (c_uint32, (c_void_p,)),
    "llama_n_seq_max": (c_uint32, (c_void_p,)),
    "llama_pooling_type": (c_int32, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_set_embeddings": (None, (c_void_p, c_bool)),
    "llama_set_n_threads": (None, (c_void_p, c_int32, c_int32)),
    "llama_get_logits_ith": (POINTER(c_float), (c_void_p, c_int32)),
    "llama_get_embeddings_ith": (POINTER(c_float), (c_void_p, c_int32)),
    "llama_memory_seq_rm": (c_bool, (c_void_p, c_int32, c_int32, c_int32)),
    "llama_memory_seq_cp": (None, (c_void_p, c_int32, c_int32, c_int32, c_int32)),
    "llama_memory_seq_pos_max": (c_int32, (c_void_p, c_int32)),
}


class Library:
    """The C functions as attributes, under their own names, with their types declared.

    Attributes:
        source: The package that carries it, and its version.
        last_words: The last warnings and errors of its log.
    """

    def __init__(self, functions: ctypes.CDLL, source: str, model_params: Any, context_params: Any) -> None:
        self.source = source
        self.last_words: deque[str] = deque(maxlen=_NUM_KEPT)
        self._functions = functions
        signatures = {
            **_SIGNATURES,
            "llama_model_default_params": (model_params, ()),
            "llama_context_default_params": (context_params, ()),
            "llama_model_load_from_file": (c_void_p, (c_char_p, model_params)),
            "llama_init_from_model": (c_void_p, (c_void_p, context_params)),
            "llama_decode": (c_int32, (c_void_p, Batch)),
        }
        for name, (result, arguments) in signatures.items():
            try:
                function = getattr(functions, name)
            except AttributeError:
                raise ModelError(
                    f"the llama.cpp of {source} has no function {name}", hint=f"install another version of {source}"
                ) from None
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)  # declared for type checkers: the functions are set one by one

    def listen(self, others: Callable[[int, bytes | None], None] | None = None) -> None:
        """Redirect llama.cpp's log: its warnings and errors go to ours, at level DEBUG, and to `last_words`.

        Args:
            others: Called with the level and the text of each line, too.
        """

        def hear(level: int, text: bytes | None, _: Any) -> None:
            if others is not None:
                others(level, text)
            line = (text or b"").decode(errors="replace").strip()
            if line and level in _LEVELS:
                self.last_words.append(line)
                _log.log(_LEVELS[level], "%s", line)

        self._ear = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)(hear)  # lives as long as the library
        self._functions.llama_log_set(self._ear, None)


@cache
def library() -> Library:
    """Return the library, loaded once in a process.

    Raises:
        MissingExtraError: If no package that carries it is installed.
        ModelError: If it can't be loaded, or its structures have a layout that is not known.
    """
    package = next((name for name in PACKAGES if importlib.util.find_spec(name) is not None), None)
    if package is None:
        raise MissingExtraError(
            "engine='llama.cpp' needs the package xllamacpp or llama-cpp-python",
            hint="pip install 'mara-integrations[llama-cpp]'",
        )
    found = _of_llama_cpp_python() if package == "llama_cpp" else _of_xllamacpp()
    found.llama_backend_init()
    _log.info("llama.cpp of %s", found.source)
    return found


def _of_llama_cpp_python() -> Library:
    try:
        from llama_cpp import llama_cpp as api
    except Exception as error:  # it loads its library when it is imported
        raise _unloadable("llama-cpp-python", error) from error
    functions = ctypes.CDLL(api._lib._name)  # of our own: theirs have their own types declared
    source = _versioned("llama-cpp-python")
    for params, names in ((api.llama_model_params, _MODEL_FIELDS), (api.llama_context_params, _CONTEXT_FIELDS)):
        if missing := set(names) - {name for name, *_ in params._fields_}:
            raise ModelError(
                f"the llama.cpp of {source} has no setting {min(missing)}",
                hint="pip install --upgrade llama-cpp-python",
            )
    found = Library(functions, source, api.llama_model_params, api.llama_context_params)
    found.listen(_as_llama_cpp_python)
    return found


def _as_llama_cpp_python(level: int, text: bytes | None) -> None:
    """Do with a line of the log as llama-cpp-python does, where the program has made a model of its own with it.

    Until then it would print everything, some hundred lines a model.
    """
    own = sys.modules.get("llama_cpp._logger")
    if own is not None and own.logger.level != logging.NOTSET:  # what `verbose` of its models sets
        own.llama_log_callback(level, text, None)


def _of_xllamacpp() -> Library:
    source = _versioned("xllamacpp")
    if sys.platform == "win32":
        raise ModelError(
            f"{source} exports no C functions on Windows", hint="pip install llama-cpp-python, which is preferred"
        )
    spec = importlib.util.find_spec("xllamacpp")  # not imported: it would start more than is needed
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else ()
    files = [file for folder in folders for file in sorted(Path(folder).glob("xllamacpp*.so"))]
    if not files:
        raise ModelError(f"{source} has no shared library", hint="install it anew")
    try:
        functions = ctypes.CDLL(os.fspath(files[0]))
    except OSError as error:
        raise _unloadable(source, error) from error
    found = Library(functions, source, ModelParams, ContextParams)
    check_layout(found.llama_model_default_params(), MODEL_DEFAULTS, source)
    check_layout(found.llama_context_default_params(), CONTEXT_DEFAULTS, source)
    found.listen()
    return found


def check_layout(params: ctypes.Structure, defaults: dict[str, Any], source: str) -> None:
    """Compare default parameters with those of the known layout.

    Raises:
        ModelError: If any differs: the fields are in other places.
    """
    for name, *_ in params._fields_:
        if name == "room":
            return
        value, expected = getattr(params, name), defaults.get(name, 0)
        if (value or 0) != expected:
            raise ModelError(
                f"the llama.cpp of {source} has an unknown layout: its {type(params).__name__} begins with "
                f"{name}={value!r} where {expected!r} was expected",
                hint="pip install 'mara-integrations[llama-cpp]' brings a version that is known, or llama-cpp-python",
            )


def _unloadable(source: str, error: BaseException) -> ModelError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ModelError(f"the llama.cpp of {source} can't be loaded: {reason}", hint=f"install {source} anew")


def _versioned(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # a folder on the path
        return package
