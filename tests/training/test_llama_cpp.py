"""Heads trained on a `.gguf` file in its own quantisation: by every method of the `q` form, for both engines."""

from __future__ import annotations

import json
import string
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mara_integrations.engine.backends.protocol import Segment
from mara_integrations.errors import ConfigError
from mara_integrations.heads.head import MARAHead
from mara_integrations.models.gguf_outline import float32_bytes
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.progress import Reporter
from mara_integrations.runtime import MARAEngine, backend_of
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.dry_run import dry_run
from mara_integrations.training.engine import with_engine
from mara_integrations.training.registry import METHODS
from mara_integrations.training.rollouts.workers import LocalWorker
from mara_integrations.training.run import train
from mara_integrations.training.scoring.fitted_reward import mean_embeddings

if not any(map(find_spec, ("llama_cpp", "xllamacpp"))):
    pytest.skip("llama.cpp is not installed", allow_module_level=True)

from gguf import GGMLQuantizationType
from tiny_gguf import oracle, write_gguf

VOWELS = "tests/reward_for_tests.py:vowels"
PAIRS = {"pairs": True}
RUNS = {
    "rloo": {"reward": VOWELS, "partial_text": True, "max_replies": 48},
    "rloo, whole replies": {"reward": VOWELS, "max_replies": 24, "rounds": 1},
    "reward-model": {"method": "reward-model", **PAIRS},
    "value": {"method": "value", **PAIRS},
    "dpo": {"method": "dpo", **PAIRS},
    "kto": {"method": "kto", **PAIRS},
    "rule": {"forbid": tuple(string.punctuation)},
    "principle": {"principle": ("Be warm.",)},
    "grounding": {"method": "grounding", "documents": True, "eval_prompts": 2},
    "teacher": {"has_teacher": True},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("MARA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    file, model = tmp_path_factory.mktemp("gguf") / "tiny.gguf", oracle(max_position_embeddings=1024)
    yield str(write_gguf(file, model, kind=GGMLQuantizationType.Q8_0))
    patch.undo()


@pytest.fixture
def config(path, tmp_path, prompts_file):
    def config(*, pairs=False, documents=False, has_teacher=False, **how):
        if has_teacher:
            model = oracle(max_position_embeddings=1024, seed=1)
            how["teacher"] = str(write_gguf(tmp_path / "tuned.gguf", model, kind=GGMLQuantizationType.Q8_0))
        if pairs or documents:
            pair = {"chosen": "so it was", "rejected": "then and"}
            count = 100 if how["method"] == "reward-model" else 30  # fewer are too few for two reward models
            rows = [{"prompt": f"{i}?", **(pair if pairs else {"context": f"{i % 7} so"})} for i in range(count)]
            prompts_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        small = {"max_reply_tokens": 6, "epochs": 1, "inner_size": 16, "eval_prompts": 2, "max_replies": 16}
        on = {"engine": "llama.cpp", "model_kwargs": {"n_threads": 1, "n_ctx": 1024}}
        return TrainConfig.of(model=path, data=prompts_file, output=tmp_path / "head", **{**small, **on, **how})

    return config


def loaded(path, engine):
    kwargs = {"n_threads": 1, "n_ctx": 1024} if engine == "llama.cpp" else {}
    return load_model(ModelSpec(path, engine=engine, model_kwargs=kwargs))


@pytest.fixture(scope="module")
def engines(path):
    return [MARAEngine(loaded(path, name), max_new_tokens=6, seed=0) for name in ("llama.cpp", "transformers")]


@pytest.mark.parametrize("how", RUNS.values(), ids=RUNS)
def test_a_head_trained_on_it_gates_on_both_engines(config, engines, how):
    result = train(config(**how))

    head = MARAHead.from_pretrained(result.output)
    assert head.config.form == "q" and result.evaluation is not None
    for engine in engines:
        assert engine.verify("what is it?", head=head).holds


def test_all_methods_of_the_form_are_tried():
    tried = {name.split(",")[0] for name in RUNS}
    assert tried == {name for name, method in METHODS.items() if method.q_loop is not None}


@pytest.mark.parametrize(
    "how, said",
    [
        ({"reward": VOWELS, "method": "sac"}, r"'sac' trains a head of the form 'residual'.*another method"),
        ({"reward": VOWELS, "form": "residual"}, r"'residual'.*leave --form out"),
        ({"reward": VOWELS, "ray": 2}, "ray"),
        ({"teacher": "org/tuned"}, "teacher='org/tuned' is not a .gguf file"),
    ],
)
def test_what_it_can_not_train_is_refused_before_any_work(config, tmp_path, how, said):
    with pytest.raises(ConfigError, match=said):
        train(config(**how))
    assert not (tmp_path / "head").exists()


def test_auto_takes_it_where_memory_can_not_hold_a_float32_copy(config, monkeypatch):
    how = {"reward": VOWELS, "engine": "auto", "model_kwargs": {}}
    assert with_engine(config(**how), Reporter()).engine == "auto"  # transformers

    copied = float32_bytes(Path(config(**how).model))
    assert copied == 4 * sum(parameter.numel() for parameter in oracle().parameters())
    monkeypatch.setattr("mara_integrations.training.engine.total_ram_bytes", lambda: copied)
    pinned = ({"engine": "transformers"}, {"dtype": "float32"}, {"model": "smollm2"})
    chosen = [with_engine(config(**how).updated(**settings), Reporter()).engine for settings in pinned]
    assert chosen == ["transformers", "auto", "auto"]
    head = train(config(**how)).head
    assert head.config.form == "q" and head.config.training["engine"] == "llama.cpp"


def test_logits_of_kept_states_are_those_of_the_engine(path):
    model = loaded(path, "llama.cpp")
    engine = MARAEngine(model, max_new_tokens=1)
    backend = backend_of(model)
    row = backend.open()
    hidden = backend.feed([Segment(row, engine.encode("what is it?"))])[-1:]
    own, computed = backend.next_logits(hidden, [row]), backend.logits(hidden)
    backend.close(row)
    assert computed.shape == own.shape and float((computed - own).norm() / own.norm()) < 0.02
    assert computed.argmax() == own.argmax()


def test_a_fitted_reward_sees_the_same_embeddings_on_both_engines(path):
    ours, theirs = (mean_embeddings(loaded(path, name), ["so it was", ""]) for name in ("llama.cpp", "transformers"))
    torch.testing.assert_close(ours, theirs)


def test_replies_of_one_engine_are_not_those_of_the_other(config, monkeypatch):
    """The cache tells the engines apart: their states differ."""
    written, submit = [], LocalWorker.submit

    def count(workers, batch, on_reply):
        written.append(len(batch.prompts) * batch.replies_per_prompt)
        return submit(workers, batch, on_reply)

    monkeypatch.setattr(LocalWorker, "submit", count)
    how = {"reward": VOWELS, "partial_text": True, "max_replies": 48, "overwrite": True}
    counts = []
    for settings in ({}, {"engine": "transformers", "model_kwargs": {}}, {"learning_rate": 1e-3}):
        train(config(**how, **settings))
        counts.append(sum(written))
        written.clear()
    assert counts[0] == counts[1] > counts[2], "the third run takes the base replies of the first"


def test_a_dry_run_counts_the_file_as_its_memory(config, path):
    estimate = dry_run(config(reward=VOWELS))
    assert estimate.model_bytes == loaded(path, "llama.cpp").model.num_bytes and estimate.seconds > 0
