"""A reward model beside a head is data too: what is no such file is refused by the reward's name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save

from mara_integrations.errors import RewardError
from mara_integrations.heads.folder import sha256
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.testing import tiny_model, tiny_tokenizer
from mara_integrations.training.scoring.reward_files import kept_reward

WORDS = ["a", "b"]
GOOD = {
    "word_weights": torch.ones(2, dtype=torch.float64),
    "word_idf": torch.ones(2, dtype=torch.float64),
    "embedding_weights": torch.ones(32),
    "embedding_mean": torch.ones(32),
    "embedding_spread": torch.ones(32),
    "spreads": torch.ones(2, dtype=torch.float64),
}


def written(words=WORDS, **changes):
    return save({**GOOD, **changes}, {"words": json.dumps(words)})


DAMAGED = {
    "nothing": b"",
    "noise": b"\xff" * 100,
    "no metadata": save(GOOD),
    "words that are numbers": written([1, 2]),
    "words that are a text": written("ab"),
    "more words than weights": written(["a", "b", "c"]),
    "words that are not JSON": save(GOOD, {"words": "["}),
    "a tensor more": written(more=torch.ones(1)),
    "another number format": written(word_idf=torch.ones(2)),
    "another shape": written(embedding_mean=torch.ones(31)),
    "a matrix": written(embedding_weights=torch.ones(32, 32)),
    "NaN": written(embedding_weights=torch.full((32,), float("nan"))),
    "a spread of 0": written(spreads=torch.zeros(2, dtype=torch.float64)),
    "cut short": written()[:-8],
}


@pytest.fixture(scope="module")
def model():
    return load_model(ModelSpec((tiny_model(), tiny_tokenizer())))


def kept(folder, data, model):
    (folder / "rewards").mkdir()
    (folder / "rewards" / "x.safetensors").write_bytes(data)
    spec = {"kind": "reward_model", "name": "mine", "file": "rewards/x.safetensors", "sha256": sha256(data)}
    return kept_reward(spec, [folder], model)


def test_a_whole_file_is_read(tmp_path, model):
    assert len(kept(tmp_path, written(), model)(["a b", "c"])) == 2


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused_by_the_rewards_name(tmp_path, model, kind):
    with pytest.raises(RewardError, match="reward model 'mine' is damaged"):
        kept(tmp_path, DAMAGED[kind], model)
