"""The same command gives the same head, whatever order Python's sets have in a process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest

from mara_integrations.training.config import TrainConfig
from mara_integrations.training.run import train

_PROGRAM = """
import json, sys, torch
torch.set_num_threads(1)
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.run import train
train(TrainConfig.of(**json.loads(sys.argv[1])))
"""


@pytest.mark.slow
def test_the_hash_seed_of_python_changes_no_head_and_no_reward_model(folder_model, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    words = ["a", "so", "it", "was", "then", "and", "there", "once", "more", "or", "less"]
    rows = (
        {
            "prompt": f"{i}?",
            "chosen": " ".join(words[(i * k) % 11] for k in (1, 3, 5)),
            "rejected": " ".join(words[(i * k) % 11] for k in (2, 7, 4)),
        }
        for i in range(100)
    )
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    small = {"max_reply_tokens": 6, "epochs": 2, "inner_size": 16, "eval_prompts": 0, "max_replies": 16}
    settings = {"model": folder_model, "data": str(pairs), "method": "reward-model", "dtype": "float32", **small}
    hash_seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # another than here
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "MARA_CACHE_DIR": str(tmp_path / "cache")}
    arguments = json.dumps({**settings, "output": str(tmp_path / "there")})

    subprocess.run([sys.executable, "-c", _PROGRAM, arguments], check=True, env=environment)
    train(TrainConfig.of(**settings, output=tmp_path / "here"))

    def files(name):
        weights = (tmp_path / name).rglob("*.safetensors")
        return {
            str(file.relative_to(tmp_path / name)): hashlib.sha256(file.read_bytes()).hexdigest() for file in weights
        }

    assert len(found := files("there")) == 3, "the head, and two reward models beside it"
    assert found == files("here")
