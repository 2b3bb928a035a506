"""A training that is killed at any moment, any number of times, ends with the head of one that was not."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
import torch

from mara_integrations.testing import tiny_model, tiny_tokenizer
from mara_integrations.training.collect import generated, given
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.run import train

VOWELS = "tests/reward_for_tests.py:vowels"
PAIRS = [{"prompt": f"{i}?", "chosen": f"aeio u{i}a", "rejected": f"bcdf g{i}k"} for i in range(28)]
THUMBS = [
    {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
    for row in PAIRS
    for name in ("chosen", "rejected")
]
KINDS = {
    "reward": {"reward": VOWELS, "partial_text": True, "rounds": 1, "max_replies": 24},
    "sentence": {"principle": "Be kind.", "rounds": 1, "max_replies": 24},
    "rule": {"forbid": tuple("!#$%&()*+=~;?"), "max_replies": 24},
    "pairs": {"method": "dpo", "form": "q"},
    "thumbs": {"method": "value"},
}


_USED = "transformers.models.llama.modeling_llama"  # by the tiny model, when it is loaded
FILE_OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def _train(settings, cache, has_started, num_operations, kill_at):
    os.environ["MARA_CACHE_DIR"] = cache
    torch.set_num_threads(1)
    generated._REPLIES_PER_BATCH = given._REPLIES_PER_FILE = 8  # several files of replies, as a larger run has

    def count(event, _):
        if event in FILE_OPERATIONS:
            num_operations.value += 1
            if num_operations.value == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    has_started.set()
    train(TrainConfig.of(**settings))


class Trainings:
    """Trainings in processes of their own, which one server forks: it has imported what they need."""

    def __init__(self, folder, model):
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pytest", "mara_integrations.training.run", _USED])
        self._folder, self._model = folder, model

    def settings(self, kind, name):
        data = self._folder / f"{kind}.jsonl"
        rows = {"pairs": PAIRS, "thumbs": THUMBS}.get(kind, [{"prompt": f"{i} {i % 7}?"} for i in range(28)])
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        small = {"max_reply_tokens": 6, "epochs": 2, "inner_size": 16, "eval_prompts": 2}
        return {"model": self._model, "data": str(data), "output": str(self._folder / name)} | small | KINDS[kind]

    def run(self, kind, name, *, kill_after_s=None, kill_at=None):
        """Train; return the seconds and the file operations it took, and whether it was killed before its end."""
        has_started, num_operations = self._context.Event(), self._context.Value("l", 0, lock=False)
        arguments = (self.settings(kind, name), str(self._folder / f"{name}-cache"), has_started, num_operations)
        process = self._context.Process(target=_train, args=(*arguments, kill_at))
        process.start()
        assert has_started.wait(120)
        began = time.monotonic()
        process.join(kill_after_s)
        process.kill()
        process.join()
        was_killed = process.exitcode == -signal.SIGKILL
        assert was_killed or process.exitcode == 0
        return time.monotonic() - began, num_operations.value, was_killed

    def weights(self, name):
        """Hashes of the head and of the reward models beside it."""
        folder = self._folder / name
        return {
            str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in folder.rglob("*.safetensors")
        }


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    tiny_model().save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    return Trainings(folder, str(folder / "tiny"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kills_at_any_moment_change_no_head(trainings, kind):
    """Three a kind: twice in the middle of work with files, once at any time."""
    whole_s, num_operations, _ = trainings.run(kind, f"{kind}-whole")
    moments, killed = random.Random(kind), f"{kind}-killed"
    for left in (1.0, 0.6):  # of the operations of the whole; the second time, the first ones are not repeated
        moment = moments.uniform(0.05, 0.7) * left
        assert trainings.run(kind, killed, kill_at=round(moment * num_operations))[2]
    trainings.run(kind, killed, kill_after_s=moments.uniform(0.05, 0.7) * 0.3 * whole_s)  # or it ends before

    trainings.run(kind, killed)

    assert trainings.weights(killed) == trainings.weights(f"{kind}-whole") != {}
