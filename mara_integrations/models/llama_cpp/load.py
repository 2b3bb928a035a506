"""Load a `.gguf` file with llama.cpp; tokenizer and configuration come from transformers, without the weights."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import transformers

from mara_integrations.errors import ConfigError, ModelError
from mara_integrations.messages import PromptEncoder
from mara_integrations.models.facts import context_window_of, eos_token_ids_of
from mara_integrations.models.gguf_outline import GgufOutline, outline_of
from mara_integrations.models.llama_cpp.library import library
from mara_integrations.models.llama_cpp.model import LlamaCppModel
from mara_integrations.models.llama_cpp.options import LlamaCppOptions
from mara_integrations.models.load import LoadedModel, ModelSpec
from mara_integrations.models.memory import in_mib
from mara_integrations.models.resolve import first_line

_log = logging.getLogger(__name__)


def load_gguf(name: str, path: Path, spec: ModelSpec) -> LoadedModel:
    """Load a file.

    Raises:
        ConfigError: If its settings name a GPU and the library has none.
        MissingExtraError: If llama.cpp or the packages for `.gguf` files are not installed.
        ModelError: If the file can't be read.
        UnsupportedModelError: If it holds a model of a kind that can't be gated here.
    """
    options = LlamaCppOptions.read(spec.model_kwargs)
    uses_gpu = _uses_gpu(spec, options)
    outline = _outline(path)
    config = transformers.AutoConfig.from_pretrained(outline.folder, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(outline.folder, local_files_only=True)
    generation = transformers.GenerationConfig.from_pretrained(outline.folder, local_files_only=True)
    window = context_window_of(config.get_text_config(), tokenizer)
    if options.n_ctx is not None and options.n_ctx > window:
        raise ConfigError(f"n_ctx={options.n_ctx} is not allowed: {name!r} has a context window of {window} tokens")
    model = LlamaCppModel(path, options, outline.output, outline.input, uses_gpu=uses_gpu)
    room = model.window = options.n_ctx or min(window, model.affordable_tokens())
    _log.info(
        "%s: room for %s tokens of the %s that the model reads, %s for keys and values; n_ctx sets another",
        name,
        f"{room:,}",
        f"{window:,}",
        in_mib(room * model.cell_bytes),
    )
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        revision=None,
        device=torch.device("cpu"),  # where hidden states and logits are handed over
        dtype=torch.float32,
        quantization=None,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        context_window=room,
        eos_token_ids=eos_token_ids_of(generation, config, tokenizer),
        encoder=PromptEncoder(tokenizer, name=name, vocab_size=model.vocab_size, max_tokens=room),
        fingerprint=outline.fingerprint,
        engine="llama.cpp",
        file_format=outline.file_format,
    )


def _uses_gpu(spec: ModelSpec, options: LlamaCppOptions) -> bool:
    """Return whether layers go to a GPU where `n_gpu_layers` does not say."""
    device, has_gpu = str(spec.device), bool(library().llama_supports_gpu_offload())
    asks = (options.n_gpu_layers or 0) != 0 or device not in ("auto", "cpu")
    if asks and not has_gpu:
        what = f"device={device!r}" if device not in ("auto", "cpu") else f"n_gpu_layers={options.n_gpu_layers}"
        raise ConfigError(
            f"{what} needs a llama.cpp with GPU support, and that of {library().source} has none",
            hint="see the package's notes on its CUDA, Metal and Vulkan builds",
        )
    return has_gpu and device != "cpu"


def _outline(path: Path) -> GgufOutline:
    try:
        return outline_of(path)
    except (ConfigError, ModelError, ImportError):
        raise
    except Exception as error:  # transformers may raise anything; the cause stays chained
        raise ModelError(
            f"the tokenizer of {path.name!r} can't be read: {first_line(error)}",
            hint="transformers reads that of most models; a newer one may know this",
        ) from error
