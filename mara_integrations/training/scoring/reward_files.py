"""Reward models that a training fitted, kept beside the head they taught, so that it can be judged by them again."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from mara_integrations.errors import RewardError
from mara_integrations.files import write_atomically
from mara_integrations.heads.folder import REWARDS_FOLDER
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.hub import head_folder
from mara_integrations.models.load import LoadedModel
from mara_integrations.rewards import Reward
from mara_integrations.training.scoring.fitted_reward import EmbeddingReward, NGramReward, RewardModel

KIND = "reward_model"  # of their descriptions in a head's config


def keep_rewards(folder: Path, head: MARAHead, rewards: Mapping[str, Reward]) -> None:
    """Write those that are reward models into a head's folder, and record them in its config.

    Raises:
        OutputError: If they can't be written.
    """
    specs = []
    for name, reward in rewards.items():
        if isinstance(reward, RewardModel):
            data, file = _dump(reward), _file(name)
            write_atomically(folder / file, data)
            specs.append({"kind": KIND, "name": name, "file": file, "sha256": hashlib.sha256(data).hexdigest()})
    head.config = head.config.model_copy(update={"rewards": (*head.config.rewards, *specs)})


def copy_rewards(folder: Path, merged: MARAHead, sources: Mapping[str, MARAHead]) -> None:
    """Copy the reward models beside several heads to the head they were merged into, and record them in its config.

    Those of one name get their head's before it. One whose file is missing stays recorded as it was.

    Args:
        folder: Of the merged head.
        merged: Not saved yet.
        sources: The heads, by folder or Hub id.

    Raises:
        OutputError: If they can't be written.
    """
    recorded = [(source, spec) for source, head in sources.items() for spec in head.config.rewards]
    counts = Counter(spec["name"] for _, spec in recorded if spec.get("kind") == KIND)
    specs, used = [], set()
    for source, spec in recorded:
        path = head_folder(source) / spec["file"] if spec.get("kind") == KIND else None
        if path is not None and path.is_file():
            own = spec["name"] if counts[spec["name"]] == 1 else f"{Path(source).name} {spec['name']}"
            numbered = (f"{own} {n}" if n > 1 else own for n in itertools.count(1))
            name = next(name for name in numbered if name not in used)
            used.add(name)
            spec = {**spec, "name": name, "file": _file(name)}
            write_atomically(folder / spec["file"], path.read_bytes())
        specs.append(spec)
    merged.config = merged.config.model_copy(update={"rewards": tuple(specs)})


def _file(name: str) -> str:
    return f"{REWARDS_FOLDER}/{name.replace(' ', '-')}.safetensors"


def kept_reward(spec: Mapping[str, Any], folders: Sequence[Path], model: LoadedModel) -> RewardModel:
    """The reward model that a head's config describes.

    Args:
        spec: The description.
        folders: Of heads; in one of them is its file.
        model: The base model, whose tokenizer and embeddings it judges by.

    Raises:
        RewardError: If none has the file, or the model's embeddings have another width.
    """
    for folder in folders:
        path = folder / spec["file"]
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == spec["sha256"]:
            return _load(path, spec["name"], model)
    raise RewardError(
        f"reward model {spec['name']!r} is not beside the head: no {spec['file']} is as it was when it was fitted",
        hint="copy the head's folder whole",
    )


def _dump(reward: RewardModel) -> bytes:
    words, embeddings = reward.words, reward.embeddings
    tensors = {
        "word_weights": torch.tensor(list(words.weights.values()), dtype=torch.float64),
        "word_idf": torch.tensor([words.idf[gram] for gram in words.weights], dtype=torch.float64),
        "embedding_weights": embeddings.weights,
        "embedding_mean": embeddings.mean,
        "embedding_spread": embeddings.spread,
        "spreads": torch.tensor(reward.spreads, dtype=torch.float64),
    }
    return save(tensors, metadata={"words": json.dumps(list(words.weights))})


def _load(path: Path, name: str, model: LoadedModel) -> RewardModel:
    with safe_open(path, "pt") as file:
        grams = json.loads(file.metadata()["words"])
        values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
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
