"""Settings of llama.cpp, as `model_kwargs` gives them. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from pydantic import Field

from mara_integrations.errors import ConfigError
from mara_integrations.sampling import Params

KVType: TypeAlias = Literal["f32", "f16", "q8_0"]

# Sequences that llama.cpp is compiled for, and those of them that hold kept prefixes; one more is taken while one of
# these gives way to another.
MAX_SEQUENCES, NUM_PREFIXES = 256, 24
# Replies decoded together at most: each needs a sequence of its own and one for a candidate.
MAX_LIVE = (MAX_SEQUENCES - NUM_PREFIXES - 1) // 2


class LlamaCppOptions(Params):
    """Settings of a model on llama.cpp, under the names of llama-cpp-python and LangChain's `ChatLlamaCpp`.

    Attributes:
        n_gpu_layers: Layers that are put on a GPU; -1 is all of them. None is all where the library has a GPU and the
            device is not the CPU.
        n_ctx: Most tokens, prompts and replies, of all sequences that are decoded together; also the most of one. None
            is the model's own context window, or as much of it as a share of the free memory holds. Keys and values
            take their memory from the start.
        n_threads: Threads of a forward; None is as many as torch takes.
        flash_attn: Whether attention is flash attention; None is where llama.cpp has it. With it, a log-probability
            differs in the third decimal by what else is decoded. Without it and with "f32" keys and values, a reply in
            a batch is that of the same request alone.
        type_k: Format of the keys that are held; "q8_0" takes half the memory of "f16".
        type_v: Format of the values; "q8_0" needs flash attention.
    """

    n_gpu_layers: int | None = Field(None, ge=-1, le=10_000)
    n_ctx: int | None = Field(None, ge=16, le=1 << 24)
    n_threads: int | None = Field(None, ge=1, le=1024)
    flash_attn: bool | None = None
    type_k: KVType = "f16"
    type_v: KVType = "f16"

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> LlamaCppOptions:
        """Read `model_kwargs`.

        Raises:
            ConfigError: If a name is unknown or a value out of bounds.
        """
        return cls.of(**given)


def check_for_llama_cpp(
    model: Any, dtype: Any, quantization: str | None, revision: str | None, model_kwargs: Mapping[str, Any]
) -> None:
    """Refuse settings that llama.cpp does not support, before anything is looked up; arguments as in `ModelSpec`.

    Raises:
        ConfigError: Names the setting, and what to use instead.
    """
    if not isinstance(model, str | os.PathLike):
        raise ConfigError(
            "engine='llama.cpp' runs .gguf files, and this model is loaded already",
            hint="give the file, or leave engine out",
        )
    formats = {"dtype": None if str(dtype) == "auto" else str(dtype), "quantization": quantization}
    for name, value in formats.items():
        if value is not None:
            raise ConfigError(
                f"{name}={value!r} is not for engine='llama.cpp': the file has its own number format",
                hint="name a .gguf file of another one, or use engine='transformers'",
            )
    if revision is not None:
        raise ConfigError(
            f"revision={revision!r} is not for engine='llama.cpp': it names a version on the Hub, not a file",
            hint="leave it out, or use engine='transformers'",
        )
    LlamaCppOptions.read(model_kwargs)
