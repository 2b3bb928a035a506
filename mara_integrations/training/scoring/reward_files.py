"""Reward models that a training fitted, kept beside the head, so that the head can be judged by them again."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from mara_integrations.errors import HeadError, OutputError, RewardError
from mara_integrations.files import write_atomically
from mara_integrations.heads.config import REWARD_MODEL, RewardFile
from mara_integrations.heads.folder import REWARDS_FOLDER, first_line, read_file, sha256
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.hub import locate
from mara_integrations.models.load import LoadedModel
from mara_integrations.rewards import Reward
from mara_integrations.training.scoring.fitted_reward import EmbeddingReward, NGramReward, RewardModel

_MAX_BYTES = 1 << 26  # 20,000 n-grams take 1 MB
_DTYPES = {
    "word_weights": torch.float64,
    "word_idf": torch.float64,
    "embedding_weights": torch.float32,
    "embedding_mean": torch.float32,
    "embedding_spread": torch.float32,
    "spreads": torch.float64,
}


def keep_rewards(folder: Path, head: MARAHead, rewards: Mapping[str, Reward]) -> None:
    """Write the reward models among `rewards` into a head's folder, and record them in its config.

    Raises:
        OutputError: If they can't be written.
    """
    specs = []
    for name, reward in rewards.items():
        if isinstance(reward, RewardModel):
            specs.append(_write(folder, name, _dump(reward)).model_dump())
    head.config = head.config.model_copy(update={"rewards": (*head.config.rewards, *specs)})


def copy_rewards(folder: Path, merged: MARAHead, sources: Mapping[str, MARAHead]) -> None:
    """Copy the reward models beside several heads to the head they were merged into, and record them in its config.

    Where several have one name, each gets the name of its head before it. A reward model whose file is missing stays
    recorded.

    Args:
        folder: Folder of the merged head; nothing is written elsewhere.
        merged: The merged head, not saved yet.
        sources: The heads, by what the user named.

    Raises:
        HeadError: If a file is not the one that its head's config describes.
        OutputError: If they can't be written.
    """
    recorded = [(source, spec) for source, head in sources.items() for spec in head.config.rewards]
    counts = Counter(spec["name"] for _, spec in recorded if spec.get("kind") == REWARD_MODEL)
    specs, used = [], set()
    for source, spec in recorded:
        if spec.get("kind") == REWARD_MODEL and (data := _read(locate(source).path, RewardFile(**spec))) is not None:
            own = spec["name"] if counts[spec["name"]] == 1 else f"{Path(source).name} {spec['name']}"
            numbered = (f"{own} {n}" if n > 1 else own for n in itertools.count(1))
            name = next(name for name in numbered if name not in used)
            used.add(name)
            spec = _write(folder, name, data).model_dump()
        specs.append(spec)
    merged.config = merged.config.model_copy(update={"rewards": tuple(specs)})


def kept_reward(spec: Mapping[str, Any], folders: Sequence[Path], model: LoadedModel) -> RewardModel:
    """Read the reward model that a head's config describes.

    Args:
        spec: The description.
        folders: Folders of heads; one of them has the file.
        model: The base model, whose tokenizer and embeddings it judges by.

    Raises:
        HeadError: If a folder has another file in its place.
        RewardError: If no folder has the file, or it was fitted to embeddings of another width.
    """
    described, changed = RewardFile(**spec), None
    for folder in folders:
        try:
            data = _read(folder, described)
        except HeadError as error:  # another head's file of the same name
            changed = error
            continue
        if data is not None:
            return _load(data, described.name, model)
    raise changed or RewardError(
        f"reward model {described.name!r} is not beside the head: there is no {described.file}",
        hint="copy the head's folder whole",
    )


def _write(folder: Path, name: str, data: bytes) -> RewardFile:
    """Write a reward model under a file name made of its name."""
    if (folder / REWARDS_FOLDER).is_symlink():
        raise OutputError(f"{str(folder / REWARDS_FOLDER)!r} is a link", hint="name another output folder")
    plain = re.sub(r"[^\w-]+", "-", name).strip("-")[:100] or "reward"
    file = RewardFile(name=name, file=f"{REWARDS_FOLDER}/{plain}.safetensors", sha256=sha256(data))
    write_atomically(folder / file.file, data)
    return file


def _read(folder: Path, described: RewardFile) -> bytes | None:
    """Read a reward model's file; None where there is none.

    Raises:
        HeadError: If it is not the one that the config describes.
    """
    if not os.path.lexists(folder / described.file):
        return None
    data = read_file(folder, described.file, _MAX_BYTES)
    if sha256(data) != described.sha256:
        raise HeadError(
            f"{str(folder / described.file)!r} is not the file that the head's config describes: its sha256 differs",
            hint="copy the head's folder whole",
        )
    return data


def _dump(reward: RewardModel) -> bytes:
    words, embeddings = reward.words, reward.embeddings
    tensors = {
        "word_weights": torch.tensor(list(words.weights.values()), dtype=torch.float64),
        "word_idf": torch.tensor([words.idf[gram] for gram in words.weights], dtype=torch.float64),
        "embedding_weights": embeddings.weights,
        "embedding_mean": embeddings.mean,
        "embedding_spread": embeddings.deviation,
        "spreads": torch.tensor(reward.deviations, dtype=torch.float64),
    }
    return save(tensors, metadata={"words": json.dumps(list(words.weights))})


def _load(data: bytes, name: str, model: LoadedModel) -> RewardModel:
    try:
        grams = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["words"])
        values = load(data)
        _check(grams, values)
    except Exception as error:  # of the file's form: anything
        raise RewardError(f"reward model {name!r} is damaged: {first_line(error)}") from None
    width = len(values["embedding_weights"])
    if width != model.hidden_size:
        raise RewardError(
            f"reward model {name!r} was fitted to embeddings of width {width}; those of {model.name!r} have "
            f"{model.hidden_size}",
            hint="name the model the head was trained on",
        )
    weights, idf = (dict(zip(grams, values[key].tolist(), strict=True)) for key in ("word_weights", "word_idf"))
    embeddings = EmbeddingReward(model, *(values[f"embedding_{part}"] for part in ("weights", "mean", "spread")))
    first, second = values["spreads"].tolist()
    reward = RewardModel(NGramReward(weights, idf), embeddings, (first, second))
    reward.__name__ = name
    return reward


def _check(grams: Any, values: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` unless this is what `_dump` writes."""
    if not isinstance(grams, list) or not all(isinstance(gram, str) for gram in grams):
        raise ValueError("its words are not a list of texts")
    if {key: value.dtype for key, value in values.items()} != _DTYPES:
        raise ValueError("it has other tensors")
    width = len(values["embedding_weights"])
    lengths = {"word_weights": len(grams), "word_idf": len(grams), "spreads": 2}
    for key, value in values.items():
        if value.shape != (lengths.get(key, width),):
            raise ValueError(f"{key} has shape {tuple(value.shape)}")
        if not value.isfinite().all() or ("spread" in key and not (value > 0).all()):
            raise ValueError(f"{key} has numbers that are not allowed")
