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

from mara_integrations.training.config import TrainConfig
from mara_integrations.training.run import train

VOWELS = "tests/reward_for_tests.py:vowels"
PAIRS = [{"prompt": f"{i}?", "chosen": f"aeio u{i}a", "rejected": f"bcdf g{i}k"} for i in range(40)]
THUMBS = [
    {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
    for row in PAIRS
    for name in ("chosen", "rejected")
]
KINDS = {
    "reward": {"reward": VOWELS, "partial_text": True, "rounds": 1, "max_replies": 96},
    "rule": {"forbid": tuple("!#$%&()*+=~;?"), "max_replies": 96},
    "pairs": {"method": "dpo", "form": "q"},
    "thumbs": {"method": "value"},
}


FILE_OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def _train(settings, cache, has_started, num_operations, kill_at):
    os.environ["MARA_CACHE_DIR"] = cache
    torch.set_num_threads(1)

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
        self._context.set_forkserver_preload(["mara_integrations.training.run"])
        self._folder, self._model = folder, model

    def settings(self, kind, name):
        data = self._folder / f"{kind}.jsonl"
        rows = {"pairs": PAIRS, "thumbs": THUMBS}.get(kind, [{"prompt": f"{i} {i % 7}?"} for i in range(40)])
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        small = {"max_reply_tokens": 8, "epochs": 6, "inner_size": 32, "eval_prompts": 4}
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


@pytest.fixture
def trainings(tmp_path, folder_model):
    return Trainings(tmp_path, folder_model)


def test_a_training_that_is_killed_twice_ends_with_the_same_head(trainings):
    _, num_operations, _ = trainings.run("reward", "whole")
    for share in (0.6, 0.3):  # of the operations of the whole; the second time, the first ones are not repeated
        assert trainings.run("reward", "killed", kill_at=round(share * num_operations))[2]
    trainings.run("reward", "killed")
    assert trainings.weights("killed") == trainings.weights("whole") != {}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_kills_at_random_moments_change_no_head(trainings, kind):
    """Five a kind: in the middle of work with files, and at any time."""
    whole_s, num_operations, _ = trainings.run(kind, "whole")
    moments, num_killed = random.Random(kind), 0
    for left in (1.0, 0.8, 0.6, 0.4, 0.2):
        moment = moments.uniform(0.05, 0.7) * left
        if moments.random() < 0.5:
            how = {"kill_at": round(moment * num_operations)}
        else:
            how = {"kill_after_s": moment * whole_s}
        num_killed += trainings.run(kind, "killed", **how)[2]
    trainings.run(kind, "killed")
    assert num_killed >= 2, "of five; a run that had little left may have ended first"
    assert trainings.weights("killed") == trainings.weights("whole") != {}
