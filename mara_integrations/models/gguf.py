"""Converted copies of `.gguf` files, which transformers reads 50 times faster: made once, kept in the cache."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import logging
from pathlib import Path
from typing import Any

import torch
import transformers

from mara_integrations.errors import MissingExtraError, ModelError
from mara_integrations.files import cache_dir, make_folder_once
from mara_integrations.models.gguf_tokenizer import byte_level_tokenizer

_log = logging.getLogger(__name__)

# Since GgufConfig exists, some files stay packed on some machines without it, and a packed model can't be saved.
_UNPACK = (
    {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
)
_CONVERSION = 2  # raise it when a converted .gguf from an older version of this file must not be used
_SAMPLE_BYTES, _NUM_SAMPLES = 1 << 16, 64


def converted(gguf: Path) -> Path:
    """Return the folder of a `.gguf` file's float32 copy, which is written on first use.

    The copy appears under its name when it is whole; of two processes that want it, the second waits.
    """
    folder = copy_of(gguf)
    if folder.is_dir():
        return folder
    require_packages(gguf)
    try:
        make_folder_once(folder, functools.partial(_convert, gguf))
    except OSError as error:
        raise ModelError(
            f"{gguf.name!r} can't be converted into {str(folder.parent)!r}: {error}",
            hint="MARA_CACHE_DIR names another folder; the copy takes 4 bytes a weight",
        ) from error
    return folder


def require_packages(gguf: Path) -> None:
    """Find out before anything slow is done whether `.gguf` files can be read.

    Raises:
        MissingExtraError: If a package is absent; names it.
    """
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise MissingExtraError(
            f"reading {gguf.name!r} needs the packages {' and '.join(missing)}",
            hint="pip install 'mara-integrations[embedded]'",
        )


def tokenizer_of(gguf: Path) -> Any:
    """Return the tokenizer of a file, as published."""
    found = byte_level_tokenizer(gguf)
    if found is None:
        found = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    return found


def copy_of(gguf: Path) -> Path:
    """Return the folder of a file's copy, whether it exists or not."""
    return cache_dir() / "gguf" / f"{gguf.stem}-{_fingerprint(gguf)}"


def is_gguf_copy(folder: str) -> bool:
    """Return whether a model's folder is a converted copy."""
    return Path(folder).parent == cache_dir() / "gguf"


def _convert(gguf: Path, folder: Path) -> None:
    _log.info("converting %s, once: about half a minute", gguf.name)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar has no switch
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            dtype=torch.float32,
            **_UNPACK,
        )
        tokenizer = tokenizer_of(gguf)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fingerprint(file: Path) -> str:
    """Hash of size and evenly spaced samples: reading all of a large file would take longer than loading the model."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{_CONVERSION} {size}".encode())
    with file.open("rb") as content:
        for sample in range(_NUM_SAMPLES):
            content.seek(max(0, size - _SAMPLE_BYTES) * sample // (_NUM_SAMPLES - 1))
            digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
