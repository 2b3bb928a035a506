"""A head's folder: `head.safetensors`, `head_config.json` and a model card, written whole and read with every check.

Knows no network: it reads and writes a config and tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from mara_integrations.errors import HeadError, OutputError
from mara_integrations.files import write_atomically
from mara_integrations.heads.card import model_card
from mara_integrations.heads.config import HeadConfig

WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "head.safetensors", "head_config.json", "README.md"
REWARDS_FOLDER = "rewards"  # reward models that the training fitted


def write_folder(
    folder: str | Path, config: HeadConfig, tensors: Mapping[str, Tensor], card: str | None = None
) -> HeadConfig:
    """Write a head's folder; each file appears whole or not at all.

    Args:
        folder: Made if absent; a head already there is replaced.
        config: The config, whatever hash of weights it names.
        tensors: The weights.
        card: Text of README.md; the one of `model_card` is written when None and none is there.

    Returns:
        The config as written, with the hash of the weights.

    Raises:
        OutputError: If the folder can't be written.
    """
    folder = Path(folder)
    if folder.is_file():
        raise OutputError(f"can't write a head to {str(folder)!r}: it is a file", hint="name a folder")
    weights = dump_weights(config, tensors)
    config = config.model_copy(update={"weights_sha256": sha256(weights)})
    write_atomically(folder / WEIGHTS_FILE, weights)
    if card is not None or not (folder / CARD_FILE).exists():
        write_atomically(folder / CARD_FILE, card or model_card(config))
    write_atomically(folder / CONFIG_FILE, json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
    return config


def read_config(folder: Path) -> HeadConfig:
    """Read `head_config.json`.

    Raises:
        HeadError: If the folder holds no head, or the file is damaged; names the file and what is wrong.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise HeadError(
                f"{str(folder)!r} is not a head: it has no {name}",
                hint=f"a head's folder holds {CONFIG_FILE} and {WEIGHTS_FILE}; `mara-tools train` writes one",
            )
    path = folder / CONFIG_FILE
    try:
        return HeadConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "json"
        raise HeadError(f"{str(path)!r} is damaged: {place}: {first['msg']}", hint="save the head again") from None


def read_weights(folder: Path, config: HeadConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read `head.safetensors`.

    Args:
        folder: The head's folder.
        config: Its config, which names the hash.
        shapes: Expected shape of each tensor.

    Raises:
        HeadError: If the file is damaged, or another one than the config describes.
    """
    path = folder / WEIGHTS_FILE
    weights = path.read_bytes()
    try:
        tensors = load_tensors(weights)
    except SafetensorError as error:
        raise HeadError(f"{str(path)!r} is damaged: {error}", hint="copy or train the head again") from None
    if config.weights_sha256 not in (None, sha256(weights)):
        raise HeadError(
            f"{str(path)!r} is not the file that {CONFIG_FILE} describes: its sha256 differs",
            hint="copy both files together, or train the head again",
        )
    check_shapes(path, config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes)
    return tensors


def check_shapes(
    path: Path, config: HeadConfig, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse tensors of other names or shapes than a head of this config has.

    Raises:
        HeadError: Names the file and the first tensor that differs.
    """
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            raise HeadError(
                f"{str(path)!r} does not hold a {config.form!r} head of hidden size {config.hidden_size}: "
                f"{name} has shape {found.get(name)}, expected {expected.get(name)}"
            )


def dump_weights(config: HeadConfig, tensors: Mapping[str, Tensor]) -> bytes:
    """Weights as one safetensors blob, with the form in its metadata so that the form is part of the hash."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return dump_tensors(tensors, metadata={"form": config.form})


def sha256(data: bytes) -> str:
    """Return the hash of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
