"""A `.gguf` file that llama.cpp has loaded, as it is: in its own quantisation, mapped into memory."""

from __future__ import annotations

import ctypes
import math
import os
import threading
import weakref
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from mara_integrations.errors import ModelError, UnsupportedModelError
from mara_integrations.models.devices import choose_device
from mara_integrations.models.gguf_outline import TensorPlace
from mara_integrations.models.llama_cpp.library import Library, library
from mara_integrations.models.llama_cpp.options import LlamaCppOptions
from mara_integrations.models.memory import default_kv_bytes

# Tokens that there is room for by default where no memory is free, and where a GPU that torch does not see holds them.
_LEAST_TOKENS, _UNSEEN_GPU_TOKENS = 2048, 8192
_NUM_LAST_LINES = 2
_NUM_PIECES, _PIECE_BYTES = 256, 1024  # of a file that are sampled
_BLOCK_ROWS = 8192  # of the output embeddings, dequantised or multiplied at once


class LlamaCppModel:
    """A loaded model. Each decoder makes a context of its own.

    Attributes:
        library: The C functions.
        handle: The C pointer to the model.
        options: How it runs.
        hidden_size: Width of the hidden state after the final norm.
        vocab_size: Width of the logits.
        cell_bytes: Memory of one token's keys and values, in bytes; an estimate for unusual attention.
        window: Most tokens of all sequences together where `n_ctx` is not given, and of one.
    """

    def __init__(
        self,
        path: Path,
        options: LlamaCppOptions,
        output: TensorPlace,
        inputs: TensorPlace,
        *,
        uses_gpu: bool = False,
    ) -> None:
        """Load a file.

        Args:
            path: The file.
            options: How it is run.
            output: Where the output embeddings lie in the file.
            inputs: Where the input embeddings lie.
            uses_gpu: Whether layers go to a GPU where the options do not say.

        Raises:
            MissingExtraError: If llama.cpp is not installed.
            ModelError: If llama.cpp can't read the file.
            UnsupportedModelError: If the model is of a kind that can't be gated on llama.cpp.
        """
        self.library: Library = library()
        self.options = options
        self._path = path
        self._output, self._input = _Table(path, output), _Table(path, inputs)
        self._half: Tensor | None = None
        self._lock = threading.Lock()
        params = self.library.llama_model_default_params()
        num_layers = options.n_gpu_layers
        params.n_gpu_layers = (-1 if uses_gpu else 0) if num_layers is None else num_layers
        self._is_on_gpu = params.n_gpu_layers != 0
        self.library.last_words.clear()
        handle = self.library.llama_model_load_from_file(os.fsencode(path), params)
        if not handle:
            reason = self._reason()
            error = UnsupportedModelError if _UNKNOWN_KIND in reason else ModelError
            raise error(
                f"llama.cpp can't load {path.name!r}{reason}",
                hint=f"is the file complete? A newer llama.cpp may support more kinds of models; {_OTHER_ENGINE}",
            )
        self.handle: int = handle
        weakref.finalize(self, self.library.llama_model_free, handle).atexit = False  # then a thread may still use it
        asked = self.library
        self.hidden_size = int(asked.llama_model_n_embd(handle))
        self.vocab_size = int(asked.llama_vocab_n_tokens(asked.llama_model_get_vocab(handle)))
        self.cell_bytes = self._cell_bytes()
        self.window = options.n_ctx or int(asked.llama_model_n_ctx_train(handle))
        kinds = {"recurrent": asked.llama_model_is_recurrent, "hybrid": asked.llama_model_is_hybrid}
        for kind, is_one in kinds.items():
            if is_one(handle):
                raise UnsupportedModelError(
                    f"{path.name!r} is a {kind} model: llama.cpp can't take tokens back in it", hint=_OTHER_ENGINE
                )
        if asked.llama_model_has_encoder(handle):
            raise ModelError(f"{path.name!r} has an encoder", hint="only causal language models can be gated")
        if (self.hidden_size, self.vocab_size) != (output.width, output.num_rows):
            raise UnsupportedModelError(
                f"the output embeddings of {path.name!r} are {output.num_rows} x {output.width}; its logits and states "
                f"have {self.vocab_size} and {self.hidden_size} numbers",
                hint=_OTHER_ENGINE,
            )

    def output_embeddings(self, token_ids: Tensor) -> Tensor:
        """Return the dequantised rows of the output embeddings of tokens, (N,) to float32 (N, d)."""
        return self._output.rows(token_ids)

    def input_embeddings(self, token_ids: Tensor) -> Tensor:
        """Return the dequantised rows of the input embeddings of tokens, (N,) to float32 (N, d)."""
        return self._input.rows(token_ids)

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits of states that were kept, (N, d) to float32 (N, V).

        llama.cpp can't compute them; these are products with the output embeddings, which stay in memory in half
        precision from the first call on. They differ from its own by its rounding of the states.

        Raises:
            ModelError: If the model scales its logits.
        """
        scale = self._number("logit_scale")
        if scale not in (None, 0.0, 1.0):
            raise ModelError(
                f"{self._path.name!r} scales its logits, and llama.cpp gives them only for what it was just fed",
                hint=f"learn from replies that are written in training; {_OTHER_ENGINE}",
            )
        with self._lock:
            if self._half is None:
                blocks = torch.arange(self.vocab_size).split(_BLOCK_ROWS)
                self._half = torch.cat([self.output_embeddings(block).half() for block in blocks])
        logits = torch.cat([states.float() @ block.float().T for block in self._half.split(_BLOCK_ROWS)], -1)
        cap = self._number("final_logit_softcapping")
        return torch.tanh(logits / cap) * cap if cap else logits

    def affordable_tokens(self) -> int:
        """Return how many tokens' keys and values the free memory holds: in the share that is theirs by default."""
        device = choose_device("auto") if self._is_on_gpu else torch.device("cpu")
        if self._is_on_gpu and device.type == "cpu":
            return _UNSEEN_GPU_TOKENS
        mapped = 0 if device.type == "cuda" else self.num_bytes  # counts as free, but each forward reads it
        return max(_LEAST_TOKENS, default_kv_bytes(device, mapped) // self.cell_bytes)

    def sample(self) -> bytes:
        """Return a sample of the file that tells it from others: its size, and pieces from all over it."""
        with self._path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            pieces = [size.to_bytes(8, "little")]
            for place in range(_NUM_PIECES):
                file.seek(size * place // _NUM_PIECES)
                pieces.append(file.read(_PIECE_BYTES))
        return b"".join(pieces)

    @property
    def num_bytes(self) -> int:
        """Size of the file, which is mapped into memory."""
        return self._path.stat().st_size

    def _cell_bytes(self) -> int:
        """Estimate the memory of a token's keys and values from the sizes of the attention."""
        asked, handle = self.library, self.handle
        architecture = self._metadata("general.architecture") or ""
        width = self.hidden_size // max(1, asked.llama_model_n_head(handle))
        per_head = 0.0
        for name, kind in (("key", self.options.type_k), ("value", self.options.type_v)):
            known = self._metadata(f"{architecture}.attention.{name}_length")
            numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
            per_head += (int(known) if known and known.isdigit() else width) * size / numbers
        num_heads = int(asked.llama_model_n_layer(handle)) * int(asked.llama_model_n_head_kv(handle))
        return math.ceil(num_heads * per_head)

    def _number(self, name: str) -> float | None:
        found = self._metadata(f"{self._metadata('general.architecture')}.{name}")
        return None if found is None else float(found)

    def _metadata(self, key: str) -> str | None:
        buffer = ctypes.create_string_buffer(256)
        length = self.library.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if length >= 0 else None

    def _reason(self) -> str:
        lines = list(self.library.last_words)[-_NUM_LAST_LINES:]
        return f": {'; '.join(lines)}" if lines else ""


_OTHER_ENGINE = "engine='transformers' may run it"
_UNKNOWN_KIND = "unknown model architecture"  # llama.cpp's own words


class _Table:
    """Embeddings in a file, of which only the rows that are asked for are read."""

    def __init__(self, path: Path, place: TensorPlace) -> None:
        self._kind = gguf.GGMLQuantizationType(place.kind)
        self._bytes = np.memmap(path, np.uint8, "r", place.offset, (place.num_rows, place.row_bytes))

    def rows(self, token_ids: Tensor) -> Tensor:
        rows = np.asarray(self._bytes[token_ids.cpu().numpy()])
        if self._kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            values = rows.view(np.float32 if self._kind is gguf.GGMLQuantizationType.F32 else np.float16)
        else:
            values = gguf.dequantize(rows, self._kind)
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
