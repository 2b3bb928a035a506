"""A head's folder: `head.safetensors`, `head_config.json` and a model card, written whole and read with every check.

A head may come from anybody: nothing in its folder is executed or imported, and no link is followed out of it. This
module knows no network: it reads and writes a config and tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from mara_integrations.errors import HeadError, OutputError
from mara_integrations.files import write_atomically
from mara_integrations.heads.card import model_card
from mara_integrations.heads.config import HeadConfig

WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "head.safetensors", "head_config.json", "README.md"
REWARDS_FOLDER = "rewards"  # reward models that the training fitted

MAX_WEIGHT_BYTES = 1 << 30  # a head of the widest models, 16,384, takes 70 MB
_MAX_CONFIG_BYTES = 1 << 22
_MAX_READS = 100  # of a head that is replaced again and again
_MAX_HEADER_BYTES = 1 << 16  # of a weights file: eight names and shapes
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Shapes = Mapping[str, tuple[int, ...]]


def write_folder(
    folder: str | Path, config: HeadConfig, tensors: Mapping[str, Tensor], card: str | None = None
) -> HeadConfig:
    """Write a head's folder, so that a reader finds the old head or the new one at any moment.

    The weights are first written under a name that holds their hash, then the config that names the hash, then the
    weights get their usual name.

    Args:
        folder: Made if absent; a head already there is replaced.
        config: The config; its hash of the weights is set here.
        tensors: The weights.
        card: Text of README.md; the one of `model_card` is written when None and none is there.

    Returns:
        The config as written.

    Raises:
        OutputError: If the folder can't be written.
    """
    folder = Path(folder)
    if folder.is_file():
        raise OutputError(f"can't write a head to {str(folder)!r}: it is a file", hint="name a folder")
    weights = dump_weights(config, tensors)
    config = config.model_copy(update={"weights_sha256": sha256(weights)})
    if card is not None or not (folder / CARD_FILE).exists():
        write_atomically(folder / CARD_FILE, card or model_card(config))
    staged = folder / _staged_name(config)
    write_atomically(staged, weights)
    write_atomically(folder / CONFIG_FILE, json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
    try:
        os.replace(staged, folder / WEIGHTS_FILE)
        for left in folder.glob(_staged_name(None)):  # by a process that was killed between two of these steps
            left.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"can't write {str(folder / WEIGHTS_FILE)!r}: {error.strerror or error}") from None
    return config


def read_folder(folder: Path, shapes_of: Callable[[HeadConfig], Shapes]) -> tuple[HeadConfig, dict[str, Tensor]]:
    """Read a head's config and its weights, as float32; always those of one head, also while it is replaced.

    Args:
        folder: The head's folder.
        shapes_of: Returns the shape of each tensor that a head of some config has.

    Raises:
        HeadError: If the folder holds no head, or a damaged one; names the file and what is wrong.
    """
    for _ in range(_MAX_READS):
        stamp = file_stamp(folder / CONFIG_FILE)
        try:
            config = read_config(folder)
            return config, read_weights(folder, config, shapes_of(config))
        except HeadError as error:
            problem = error
            if file_stamp(folder / CONFIG_FILE) == stamp:  # else another head has come in between
                break
    raise problem


def file_stamp(path: Path) -> tuple[int, ...] | None:
    """Return numbers that change whenever a file is written or replaced; None without a file.

    The time of the last change of the inode can't be set, so that a file copied with the old one's times is told apart.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_config(folder: Path) -> HeadConfig:
    """Read `head_config.json`.

    Raises:
        HeadError: If the folder holds no head, or the file is damaged; names the file and what is wrong.
    """
    data = read_file(folder, CONFIG_FILE, _MAX_CONFIG_BYTES)
    try:
        return HeadConfig.model_validate_json(data)
    except ValidationError as error:
        raise HeadError(
            f"{str(folder / CONFIG_FILE)!r} is damaged: {first_problem(error)}", hint="save the head again"
        ) from None


def read_weights(folder: Path, config: HeadConfig, shapes: Shapes) -> dict[str, Tensor]:
    """Read the weights, as float32.

    Args:
        folder: The head's folder.
        config: Its config, which names the hash.
        shapes: Expected shape of each tensor.

    Raises:
        HeadError: If the file is damaged, not the one that the config describes, or no head of these shapes; nothing
            larger than a head of these shapes is read.
    """
    path = folder / WEIGHTS_FILE
    check_size(str(path), shapes)
    max_bytes = 8 * sum(map(math.prod, shapes.values())) + _MAX_HEADER_BYTES  # at most 8 bytes a weight
    staged = _staged_name(config)
    name = staged if config.weights_sha256 is not None and os.path.lexists(folder / staged) else WEIGHTS_FILE
    try:
        data = read_file(folder, name, max_bytes)
    except HeadError:
        if name == WEIGHTS_FILE:
            raise
        data = read_file(folder, WEIGHTS_FILE, max_bytes)  # it has got its usual name in between
    try:
        tensors = load_tensors(data)
    except Exception as error:  # of safetensors, or a KeyError for a number format that torch has not
        reason = first_line(error)
        raise HeadError(f"{str(path)!r} is damaged: {reason}", hint="copy or train the head again") from None
    check_shapes(str(path), config, tensors, shapes)
    if config.weights_sha256 not in (None, sha256(data)):
        raise HeadError(
            f"{str(path)!r} is not the file that {CONFIG_FILE} describes: its sha256 differs",
            hint="copy both files together, or train the head again",
        )
    return as_float32(str(path), tensors)


def read_file(folder: Path, name: str, max_bytes: int) -> bytes:
    """Read a file of a head's folder.

    Args:
        folder: The folder, or a link to it.
        name: A file name, or one in a folder inside.
        max_bytes: Largest size that is read.

    Raises:
        HeadError: If there is no such file, a link leads out of the folder, it is not a regular file, too large, or
            can't be read.
    """
    path = folder / name
    try:
        root = folder.resolve(strict=True)
        target = path.resolve(strict=True)
        if not (target.is_relative_to(root) or _is_hub_blob(root, target)):
            raise HeadError(f"{str(path)!r} is a link out of the head's folder", hint="put the file itself there")
        return read_regular(target, max_bytes)
    except HeadError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise HeadError(
            f"{str(folder)!r} is not a head: it has no {name}",
            hint=f"a head's folder holds {CONFIG_FILE} and {WEIGHTS_FILE}; `mara-tools train` writes one",
        ) from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a circle of links, before Python 3.13
        raise HeadError(f"{str(path)!r} can't be read: {first_line(error)}") from None


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Read a file if it is a regular one of a bounded size.

    Raises:
        HeadError: If it is a device, a pipe or a folder, or larger than `max_bytes`.
        OSError: If it can't be opened.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe would block
    with open(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise HeadError(f"{str(path)!r} is not a regular file")
        if status.st_size > max_bytes:
            raise HeadError(
                f"{str(path)!r} has {status.st_size:,} bytes; at most {max_bytes:,} are expected there",
                hint="is this the right file?",
            )
        return file.read(max_bytes)


def check_size(name: str, shapes: Shapes) -> None:
    """Refuse a head that would take more than `MAX_WEIGHT_BYTES`.

    Raises:
        HeadError: Names `name`, which holds the head.
    """
    num_bytes = 4 * sum(map(math.prod, shapes.values()))
    if num_bytes > MAX_WEIGHT_BYTES:
        raise HeadError(f"{name!r} describes a head of {num_bytes:,} bytes; at most {MAX_WEIGHT_BYTES:,} are allowed")


def check_shapes(name: str, config: HeadConfig, tensors: Mapping[str, Tensor], shapes: Shapes) -> None:
    """Refuse tensors of other names, shapes or number formats than a head of this config has.

    Raises:
        HeadError: Names `name`, which holds the tensors, and the first tensor that differs.
    """
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for key in {**shapes, **found}:
        if shapes.get(key) != found.get(key):
            raise HeadError(
                f"{name!r} does not hold a {config.form!r} head of hidden size {config.hidden_size}: "
                f"{key!r} has shape {found.get(key)}, expected {shapes.get(key)}"
            )
    for key, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise HeadError(
                f"{name!r} has {key!r} in {dtype}", hint="weights are float16, bfloat16, float32 or float64"
            )


def as_float32(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights as float32.

    Raises:
        HeadError: If one is not finite, or does not fit float32; names `name`, which holds the tensors.
    """
    weights = {key: tensor.float() for key, tensor in tensors.items()}
    for key, weight in weights.items():
        if not weight.isfinite().all():
            raise HeadError(f"{name!r} has weights that are not finite, in {key!r}", hint="train the head again")
    return weights


def dump_weights(config: HeadConfig, tensors: Mapping[str, Tensor]) -> bytes:
    """Return the weights as one safetensors blob; its metadata has the form, which so is part of the hash."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return dump_tensors(tensors, metadata={"form": config.form})


def sha256(data: bytes) -> str:
    """Return the hash of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def first_problem(error: ValidationError) -> str:
    """Return where a config is wrong first, and how."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "json"
    return f"{place[:100]}: {first['msg'][:200]}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _staged_name(config: HeadConfig | None) -> str:
    """Name of weights whose config is not in place yet; a pattern of all such names for None."""
    return f"head.{'*' if config is None else str(config.weights_sha256)[:16]}.safetensors"


def _is_hub_blob(root: Path, target: Path) -> bool:
    """Return whether a file is a link of the Hub's cache: `repo/snapshots/COMMIT/name` to `repo/blobs/HASH`."""
    repo = root.parent.parent
    return root.parent.name == "snapshots" and target.parent == repo / "blobs"
