"""A dry run names the replies and the work of the run: by every method, they are what the run then does."""

from __future__ import annotations

import json
import string
from dataclasses import replace

import pytest

from mara_integrations.engine.backends.packed import PackedBackend
from mara_integrations.models.int8 import weight_bytes
from mara_integrations.testing import tiny_model, tiny_tokenizer
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.dry_run import dry_run
from mara_integrations.training.methods import principle, sac
from mara_integrations.training.registry import METHODS
from mara_integrations.training.rollouts.workers import LocalWorker
from mara_integrations.training.run import train
from mara_integrations.training.scoring import greedy

VOWELS = "tests/reward_for_tests.py:vowels"
WHOLE = {"reward": VOWELS, "max_replies": 24, "rounds": 1}
PUNCTUATION = tuple(string.punctuation)
RUNS = {
    "rloo": {"reward": VOWELS, "partial_text": True},
    "rloo, rounds": {"reward": VOWELS, "partial_text": True, "rounds": 1, "kl_budget": 0.3},
    "rloo, whole replies": WHOLE,
    "rloo, residual": {**WHOLE, "form": "residual", "rounds": 0},
    "reward-model": {"method": "reward-model"},
    "reward-model, residual": {"method": "reward-model", "form": "residual"},
    "value": {"reward": VOWELS, "method": "value"},
    "value of pairs": {"method": "value"},
    "value, q": {"reward": VOWELS, "method": "value", "form": "q"},
    "value of pairs, q": {"method": "value", "form": "q"},
    "dpo, q": {"method": "dpo", "form": "q"},
    "kto": {"method": "kto"},
    "sac": {"reward": VOWELS, "method": "sac", "max_replies": 32},
    "rule": {"forbid": PUNCTUATION},
    "principle": {"principle": ("Be warm.",)},
    "principle, beside a reward": {"principle": ("Be warm.",), "reward": VOWELS, "partial_text": True},
    "principle, rounds": {"principle": ("Be warm.=2", "Be brief."), "rounds": 1},
    "principle, rounds beside a reward": {
        "principle": ("Be warm.",),
        "reward": VOWELS,
        "partial_text": True,
        "rounds": 1,
        "judge": VOWELS,
    },
    "grounding": {"method": "grounding"},
    "grounding, rounds": {"method": "grounding", "rounds": 1},
    "teacher": {"teacher": "tuned"},
    "teacher, rounds": {"teacher": "tuned", "rounds": 1},
    "teacher, its base and a sentence": {"teacher": "tuned", "teacher_base": "tuned", "principle": ("Be warm.",)},
    "rule, residual": {"forbid": PUNCTUATION, "form": "residual"},
}


@pytest.fixture
def config(folder_model, prompts_file, tmp_path, monkeypatch):
    few = replace(sac.default_settings("residual"), batch_size=32, warmup=75, updates=1)
    monkeypatch.setattr(sac, "default_settings", lambda form, credit: few)
    monkeypatch.setattr(sac, "_REPLIES_PER_ROUND", 16)

    def config(**how):
        if "teacher" in how:
            tiny_model(seed=1).save_pretrained(tmp_path / "tuned")
            tiny_tokenizer().save_pretrained(tmp_path / "tuned")
            how |= {role: str(tmp_path / how[role]) for role in ("teacher", "teacher_base") if role in how}
        if not {"reward", "forbid", "principle", "teacher"} & set(how):
            pair = {"chosen": "so it was", "rejected": "then and"}
            is_grounding = how.get("method") == "grounding"
            count = 100 if how.get("method") == "reward-model" else 40  # fewer are too few for two reward models
            rows = [{"prompt": f"{i}?", **({"context": f"{i % 7} so"} if is_grounding else pair)} for i in range(count)]
            prompts_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        small = {"max_reply_tokens": 6, "epochs": 1, "inner_size": 16, "eval_prompts": 2, "max_replies": 16}
        return TrainConfig.of(model=folder_model, data=prompts_file, output=tmp_path / "h", **{**small, **how})

    return config


@pytest.mark.usefixtures("nothing_fed_ahead")  # how much is depends on the machine
@pytest.mark.parametrize("how", RUNS.values(), ids=RUNS)
def test_it_counts_the_replies_and_the_tokens_that_the_run_feeds(config, tmp_path, how, monkeypatch):
    expected = dry_run(config(**how)).expected
    assert not (tmp_path / "h").exists()
    written, fed, submit, feed = [], [], LocalWorker.submit, PackedBackend.feed

    def count_replies(workers, batch, on_reply):
        written.append(len(batch.prompts) * batch.replies_per_prompt)
        return submit(workers, batch, on_reply)

    def count_tokens(backend, segments):
        fed.append(sum(len(segment.token_ids) for segment in segments))
        return feed(backend, segments)

    monkeypatch.setattr(LocalWorker, "submit", count_replies)
    monkeypatch.setattr(PackedBackend, "feed", count_tokens)
    monkeypatch.setattr(greedy, "quality_losses", lambda *_: (0.0, 2.0))  # every setting that may be tried is
    monkeypatch.setattr(principle, "quality_ratios", lambda *_: (1.0, 0.5))  # so that it is fitted twice
    train(config(**how))

    assert sum(written) == expected.generated
    assert 1 / 1.5 < sum(fed) / expected.tokens_fed < 1.5


def test_every_method_is_tried():
    assert {name.split(",")[0].split(" of ")[0] for name in RUNS} == set(METHODS)


def test_replies_in_the_cache_are_told_and_take_no_time(config):
    how = {"reward": VOWELS, "partial_text": True}
    before = dry_run(config(**how)).expected
    train(config(**how))

    after = dry_run(config(**how, learning_rate=1e-3, overwrite=True)).expected

    assert before.cached == 0 < after.cached < after.replies == before.replies
    assert after.tokens_fed < before.tokens_fed


def test_memory_counts_the_copy_of_the_weights(config):
    estimate = dry_run(config(reward=VOWELS))
    model = tiny_model()
    layers, logits = weight_bytes(model.get_decoder().layers), weight_bytes(model.get_output_embeddings())
    assert estimate.model_bytes == weight_bytes(model) + layers + logits
    assert estimate.peak_bytes > estimate.model_bytes + estimate.states_bytes
