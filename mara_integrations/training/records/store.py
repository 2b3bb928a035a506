"""What was gathered is kept in files: for a run that is interrupted, and base replies for every later run too.

A file is plain data and its digest, written whole or not at all; one that is damaged counts as absent.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mara_integrations.engine.sequence import JudgedPosition
from mara_integrations.errors import OutputError
from mara_integrations.files import cache_dir, write_atomically
from mara_integrations.models import ranks
from mara_integrations.models.load import LoadedModel
from mara_integrations.training.rollouts.replies import Reply

# The cache's least recently used files make room for new ones. 128 replies of 48 tokens take 40 MB for a model of
# width 576.
MAX_CACHE_BYTES = 4 << 30
_BLOCK = 1 << 20


def kept(path: Path, gather: Callable[[], list[Reply]]) -> tuple[list[Reply], bool]:
    """Replies from a file, or gathered now and written there; and whether they were kept.

    Raises:
        OutputError: If they can't be written.
    """
    stored, was_kept = kept_data(path, lambda: [_packed(reply) for reply in gather()])
    return [_unpacked(item) for item in stored], was_kept


def kept_data(path: Path, gather: Callable[[], Any]) -> tuple[Any, bool]:
    """As `kept`, for anything made of tensors, numbers, strings, lists, tuples and dicts.

    Tensors are those of the file, read when they are looked at and forgotten when memory is short.
    """
    data = read_data(path)
    if data is not None:
        return data, True
    buffer = io.BytesIO()
    torch.save(gather(), buffer)
    buffer.seek(0)
    payload = buffer.getvalue()
    write_atomically(path, payload + hashlib.sha256(payload).digest())
    data = read_data(path)
    return (torch.load(buffer, weights_only=True) if data is None else data), False  # another run may have pruned it


def cache_file(key: str) -> Path:
    """Where `cached` keeps replies: under the platform's cache folder (`MARA_CACHE_DIR`), where all runs look."""
    return cache_dir() / "replies" / f"{key}.pt"


def cached(path: Path, gather: Callable[[], list[Reply]]) -> tuple[list[Reply], bool]:
    """As `kept`, in a folder of bounded size."""
    replies, was_kept = kept(path, gather)
    try:
        with suppress(FileNotFoundError):  # another run has pruned it
            os.utime(path)  # used just now
        _make_room(path.parent)
    except OSError as error:
        raise OutputError(f"can't keep {str(path)!r}: {error.strerror}", hint="MARA_CACHE_DIR names another") from error
    return replies, was_kept


def model_fingerprint(model: LoadedModel) -> str:
    """Of a model's name, type and weights, by a sample of every tensor: a fine-tuned copy differs."""
    digest = hashlib.sha256(f"{model.name} {model.revision} {model.dtype}".encode())
    for name, tensor in model.model.state_dict().items():
        flat = ranks.own_part(tensor).detach().flatten()
        sample = flat[:: max(1, len(flat) // 256)]
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(sample.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:32]


def _make_room(folder: Path) -> None:
    found = []
    for file in folder.glob("*.pt"):
        with suppress(FileNotFoundError):  # another run prunes too
            found.append((file.stat(), file))
    total = 0
    for status, file in sorted(found, key=lambda each: each[0].st_mtime_ns, reverse=True):
        total += status.st_size
        if total > MAX_CACHE_BYTES:
            file.unlink(missing_ok=True)


def read_data(path: Path) -> Any | None:
    """What a file of `kept_data` holds; None where there is none, or not the whole of one."""
    try:
        return torch.load(path, weights_only=True, mmap=True) if _is_whole(path) else None
    except FileNotFoundError:
        return None


def _is_whole(path: Path) -> bool:
    """Whether a file ends with the digest of what stands before."""
    left, digest = path.stat().st_size - hashlib.sha256().digest_size, hashlib.sha256()
    with path.open("rb") as file:
        while left > 0:
            block = file.read(min(left, _BLOCK))
            digest.update(block)
            left -= len(block)
        return file.read() == digest.digest()


_POSITION = ("index", "token_ids", "hazard_logits", "states", "previous")


def _packed(reply: Reply) -> dict[str, Any]:
    """As plain data, in half precision, so that a resumed run and an uninterrupted one see the same numbers."""
    positions = [
        (p.index, p.token_ids, p.hazard_logits, p.states.half().cpu(), p.previous.half().cpu()) for p in reply.positions
    ]
    return {
        "prompt": reply.prompt,
        "text": reply.text,
        "token_ids": reply.token_ids,
        "states": reply.states,
        "positions": positions,
        "log_probs": reply.log_probs,
    }


def _unpacked(item: dict[str, Any]) -> Reply:
    positions = [JudgedPosition(**dict(zip(_POSITION, values, strict=True))) for values in item["positions"]]
    return Reply(**{**item, "positions": positions})
