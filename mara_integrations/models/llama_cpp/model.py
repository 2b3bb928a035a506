"""A `.gguf` file that llama.cpp has loaded, as it is: in its own quantisation, mapped into memory."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from mara_integrations.errors import ModelError
from mara_integrations.models.gguf_outline import TensorPlace
from mara_integrations.models.llama_cpp.library import Library, library
from mara_integrations.models.llama_cpp.options import LlamaCppOptions

# Bytes of a key or value, which llama.cpp keeps in half precision.
_VALUE_BYTES = 2
_NUM_LAST_LINES = 2


class LlamaCppModel:
    """A loaded model. What decodes with it makes a context of its own.

    Attributes:
        library: The C functions.
        handle: The C pointer to the model.
        options: How it runs.
        hidden_size: Width of the hidden state after the final norm.
        vocab_size: Width of the logits.
        cell_bytes: Memory of one token's keys and values, in bytes; an estimate for unusual attention.
    """

    def __init__(self, path: Path, options: LlamaCppOptions, output: TensorPlace, *, uses_gpu: bool = False) -> None:
        """Load a file.

        Args:
            path: The file.
            options: How it is run.
            output: Where the output embeddings lie in the file.
            uses_gpu: Whether layers go to a GPU where the options do not say.

        Raises:
            MissingExtraError: If llama.cpp is not installed.
            ModelError: If llama.cpp can't read the file, or the model is not one whose sequences can be cut.
        """
        self.library: Library = library()
        self.options = options
        self._path, self._output = path, output
        self._table: Any = None
        self._lock = threading.Lock()
        params = self.library.llama_model_default_params()
        num_layers = options.n_gpu_layers
        params.n_gpu_layers = (-1 if uses_gpu else 0) if num_layers is None else num_layers
        self.library.last_words.clear()
        handle = self.library.llama_model_load_from_file(os.fsencode(path), params)
        if not handle:
            raise ModelError(
                f"llama.cpp can't load {path.name!r}{self._reason()}",
                hint="is the file whole? A newer llama.cpp may know more kinds of models",
            )
        self.handle: int = handle
        weakref.finalize(self, self.library.llama_model_free, handle).atexit = False  # then a thread may still use it
        asked = self.library
        self.hidden_size = int(asked.llama_model_n_embd(handle))
        self.vocab_size = int(asked.llama_vocab_n_tokens(asked.llama_model_get_vocab(handle)))
        self.cell_bytes = self._cell_bytes()
        kinds = {"recurrent": asked.llama_model_is_recurrent, "hybrid": asked.llama_model_is_hybrid}
        for kind, is_one in kinds.items():
            if is_one(handle):
                raise ModelError(
                    f"{path.name!r} is a {kind} model: llama.cpp can't take tokens back in it", hint=_OTHER_ENGINE
                )
        if asked.llama_model_has_encoder(handle):
            raise ModelError(f"{path.name!r} has an encoder", hint="only causal language models can be gated")
        if (self.hidden_size, self.vocab_size) != (output.width, output.num_rows):
            raise ModelError(
                f"the output embeddings of {path.name!r} are {output.num_rows} x {output.width}; its logits and states "
                f"have {self.vocab_size} and {self.hidden_size} numbers",
                hint=_OTHER_ENGINE,
            )

    def output_embeddings(self, token_ids: Tensor) -> Tensor:
        """Return the dequantised rows of the output embeddings of tokens, (N,) to float32 (N, d)."""
        with self._lock:
            if self._table is None:
                shape = (self._output.num_rows, self._output.row_bytes)
                self._table = np.memmap(self._path, np.uint8, "r", self._output.offset, shape)
        rows = np.asarray(self._table[token_ids.cpu().numpy()])
        kind = gguf.GGMLQuantizationType(self._output.kind)
        if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            values = rows.view(np.float32 if kind is gguf.GGMLQuantizationType.F32 else np.float16).astype(np.float32)
        else:
            values = gguf.dequantize(rows, kind)
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

    def _cell_bytes(self) -> int:
        """Estimate the memory of a token's keys and values from the sizes of the attention."""
        asked, handle = self.library, self.handle
        architecture = self._metadata("general.architecture") or ""
        width = self.hidden_size // max(1, asked.llama_model_n_head(handle))
        widths = [self._metadata(f"{architecture}.attention.{name}_length") for name in ("key", "value")]
        per_head = sum(int(known) if known and known.isdigit() else width for known in widths)
        num_heads = int(asked.llama_model_n_layer(handle)) * int(asked.llama_model_n_head_kv(handle))
        return num_heads * per_head * _VALUE_BYTES

    def _metadata(self, key: str) -> str | None:
        buffer = ctypes.create_string_buffer(256)
        length = self.library.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if length >= 0 else None

    def _reason(self) -> str:
        lines = list(self.library.last_words)[-_NUM_LAST_LINES:]
        return f": {'; '.join(lines)}" if lines else ""


_OTHER_ENGINE = "engine='transformers' may run it"
