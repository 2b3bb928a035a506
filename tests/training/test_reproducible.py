"""The same command gives the same head, whatever order Python's sets have in a process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

_PROGRAM = """
import json, sys, torch
torch.set_num_threads(1)
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.run import train
train(TrainConfig.of(**json.loads(sys.argv[1])))
"""


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

    def files(hash_seed):
        output = tmp_path / hash_seed
        settings = {"max_reply_tokens": 6, "epochs": 2, "inner_size": 16, "eval_prompts": 0, "max_replies": 16}
        named = {"model": folder_model, "data": str(pairs), "output": str(output), "method": "reward-model"}
        environment = {"PYTHONHASHSEED": hash_seed, "MARA_CACHE_DIR": str(tmp_path / f"cache-{hash_seed}")}
        subprocess.run(
            [sys.executable, "-c", _PROGRAM, json.dumps(named | settings)],
            check=True,
            env={**os.environ, **environment},
        )
        weights = output.rglob("*.safetensors")
        return {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest() for file in weights}

    assert len(found := files("1")) == 3, "the head, and two reward models beside it"
    assert found == files("2")
