"""Training on Ray: the same replies and heads as in one process, also where an actor dies; a local cluster of two."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import pytest

pytest.importorskip("ray", reason="the extra `ray` is not installed")
import ray

from mara_integrations.engine.backends.select import make_backend
from mara_integrations.errors import ConfigError, EngineClosedError, MissingExtraError, RewardError
from mara_integrations.messages import Conversation, Message
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.rewards import load_reward, load_rewards, reward_spec, score
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.dry_run import dry_run
from mara_integrations.training.learning.actor_critic import default_settings
from mara_integrations.training.rollouts.ray_cluster import import_ray
from mara_integrations.training.rollouts.ray_workers import RayWorkers
from mara_integrations.training.rollouts.workers import LocalWorker, RolloutBatch
from mara_integrations.training.run import train
from mara_integrations.training.scoring.ray_rewards import RayReward, on_ray

pytestmark = pytest.mark.slow

VOWELS = "tests/reward_for_tests.py:vowels"
BOTH = (VOWELS, "length?words=3&weight=0.5")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(20)))
    return folder


@pytest.fixture(scope="module")
def here(folder):
    model = load_model(ModelSpec(str(folder / "tiny")))
    return LocalWorker(model, make_backend(model.model))


@pytest.fixture(scope="module")
def lines():
    return []


@pytest.fixture(scope="module")
def workers(folder, lines):
    workers = RayWorkers(ModelSpec(str(folder / "tiny")), 2, False, lines.append)
    yield workers
    workers.close()


def batches(count=5):
    head = random_head(32, "residual")
    return [
        RolloutBatch(
            [Conversation((Message("user", f"{i} {text}"),)) for text in "ab"],
            SamplingParams(max_new_tokens=12, temperature=1.0),
            seed=100 * i,
            replies_per_prompt=2,
            head=head,
        )
        for i in range(count)
    ]


def same(a, b):
    """Two replies agree in everything, to the last bit."""
    return (
        (a.prompt_index, a.text, a.token_ids) == (b.prompt_index, b.text, b.token_ids)
        and a.states.equal(b.states)
        and all(p.states.equal(q.states) for p, q in zip(a.positions, b.positions, strict=True))
    )


def test_a_lost_actor_is_replaced_and_every_reply_is_there_once_and_the_same(here, workers, lines):
    counted, got = [], []
    pending = [workers.submit(batch, counted.append) for batch in batches()]
    victim = workers.actors[0]  # has one of them, and others wait for it
    ray.kill(victim)
    with pytest.raises(ray.exceptions.RayActorError):  # it is killed a moment later
        while True:
            ray.get(victim.generate.remote(batches(1)[0]))
    for replies in pending:
        got += replies()
    want = [reply for batch in batches() for reply in here.submit(batch, lambda count: None)()]
    assert len(got) == len(want) == 20 and sum(counted) == 20, "none lost, none counted twice"
    assert all(same(a, b) for a, b in zip(got, want, strict=True))
    assert len(lines) >= 1 and "an actor was lost" in lines[0]
    assert victim not in workers.actors


def test_the_same_head_comes_out_as_in_one_process(folder, workers, tmp_path, monkeypatch):
    def small(form, credit):
        return replace(default_settings(form, credit), batch_size=32, warmup=75, updates=1)

    def of_this_module(spec, count, on_gpu, say):
        assert (spec.model, count, on_gpu) == (str(folder / "tiny"), len(workers.actors), False)
        return workers

    monkeypatch.setattr("mara_integrations.training.methods.sac.default_settings", small)
    monkeypatch.setattr("mara_integrations.training.methods.sac._REPLIES_PER_ROUND", 16)
    monkeypatch.setattr("mara_integrations.training.run.RayWorkers", of_this_module)  # to start others takes long
    monkeypatch.setattr(RayWorkers, "close", lambda self: None)

    def run(name, **values):
        settings = {"max_replies": 48, "max_reply_tokens": 6, "inner_size": 32, "eval_prompts": 2, "method": "sac"}
        files = {"model": str(folder / "tiny"), "data": folder / "prompts.jsonl", "output": tmp_path / name}
        return train(TrainConfig.of(reward=BOTH, staleness=1, **files, **settings, **values))

    alone, spread = run("alone"), run("spread", ray=2)
    assert alone.head.fingerprint == spread.head.fingerprint
    assert alone.head.config.rewards == spread.head.config.rewards
    assert {"vowels", "length"} < set(alone.evaluation.rewards)
    assert alone.evaluation.rewards == spread.evaluation.rewards, "the rewards were actors too"


def test_work_that_kills_every_actor_ends_the_run(workers, monkeypatch):
    monkeypatch.setattr("mara_integrations.training.rollouts.ray_workers.MAX_LOSSES", 1)

    class Deadly(RolloutBatch):  # defined here, so that it travels with its code
        __slots__ = ()

        def generate(self, model, backend, on_reply=None):
            os.kill(os.getpid(), 9)

    batch = batches(1)[0]
    replies = workers.submit(Deadly(batch.prompts, batch.sampling, batch.seed), lambda count: None)
    with pytest.raises(EngineClosedError, match="1 actors in a row were lost"):
        replies()


def test_a_dry_run_starts_the_actors_too_and_writes_nothing(folder, tmp_path, monkeypatch):
    closed, close = [], RayWorkers.close
    monkeypatch.setattr(RayWorkers, "close", lambda self: closed.append(len(self.actors)) or close(self))
    files = {"model": str(folder / "tiny"), "data": folder / "prompts.jsonl", "output": tmp_path / "head"}

    estimate = dry_run(TrainConfig.of(reward=VOWELS, max_reply_tokens=6, max_replies=64, ray=1, **files))

    assert estimate.replies > 0 and closed == [1]
    assert list(tmp_path.iterdir()) == []


def test_several_rewards_are_an_actor_each_and_weighed_as_here():
    here, prompts = load_rewards(BOTH, normalise=True), [(Message("user", "?"),)] * 9
    texts = ["ae " * i + "xyz" for i in range(9)]
    there = on_ray(here)
    for name, part in there.parts.items():
        assert isinstance(part, RayReward) and part.__name__ == name
        assert part.spec() == here.parts[name].spec()
        assert score(part, prompts, texts) == score(here.parts[name], prompts, texts)
    assert there.__name__ == here.__name__ and reward_spec(there) == reward_spec(here)
    assert score(there, prompts, texts) == score(here, prompts, texts)
    assert there.scales == here.scales and len(there.scales) == 2
    ray.kill(there.parts["vowels"].actor)
    assert score(there, prompts[:2], texts[:2]) == score(here, prompts[:2], texts[:2]), "a lost one is replaced"


def test_what_a_reward_raises_in_an_actor_is_told_as_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_reward.py").write_text("def broken(completions):\n    raise ValueError('no judge today')\n")
    with pytest.raises(RewardError, match="reward 'broken' raised ValueError: no judge today"):
        score(RayReward(load_reward("broken_reward.py:broken")), [(Message("user", "?"),)], ["a"])


def test_more_actors_than_gpus_are_refused(folder):
    with pytest.raises(ConfigError, match=r"ray=2 is not allowed: each process takes a GPU, and the cluster has 0"):
        RayWorkers(ModelSpec(str(folder / "tiny")), 2, True, print)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mara-integrations\[ray\]'"):
        import_ray()
