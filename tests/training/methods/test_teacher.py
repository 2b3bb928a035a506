"""A head from a second model that reads the base model's replies, from end to end on tiny models."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import warnings
import weakref

import pytest
import torch

from mara_integrations.errors import ConfigError, MissingExtraError, ModelError
from mara_integrations.heads.head import MARAHead
from mara_integrations.progress import Reporter
from mara_integrations.testing import tiny_model, tiny_tokenizer
from mara_integrations.training import teachers
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import limited_prompts
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.dry_run import dry_run
from mara_integrations.training.identity import Identity
from mara_integrations.training.methods.readings import Side
from mara_integrations.training.methods.teacher import differences
from mara_integrations.training.plan import make_plan
from mara_integrations.training.registry import METHODS
from mara_integrations.training.run import start, train

SMALL = {"max_reply_tokens": 6, "epochs": 2, "inner_size": 16, "eval_prompts": 4, "max_replies": 16}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Models and prompts, which no test changes."""
    folder = tmp_path_factory.mktemp("saved")
    for name, seed in (("tiny", 0), ("tuned", 1), ("plain", 2)):
        tiny_model(seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": f"{i} {chr(97 + i % 26)}?"} for i in range(20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def files(saved, tmp_path):
    """A copy of the models and prompts."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path


def config(files, name="head", **settings):
    named = {"model": str(files / "tiny"), "data": files / "prompts.jsonl", "teacher": str(files / "tuned")}
    return TrainConfig.of(**{**named, "output": files / name, **SMALL, **settings})


def weights(files, name):
    return (files / name / "head.safetensors").read_bytes()


def differ(one, other):
    return not all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


@pytest.fixture(scope="module")
def from_two(saved, tmp_path_factory):
    """A run with a teacher and its base: its files, its result, and how many of the two were in memory when."""
    files = tmp_path_factory.mktemp("two") / "files"
    shutil.copytree(saved, files)
    alive, load, counts = weakref.WeakSet(), teachers.load_model, []

    def remembering(spec):
        loaded = load(spec)
        alive.add(loaded.model)
        counts.append(len(alive))
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARA_CACHE_DIR", str(files / "cache"))
        patch.setattr(teachers, "load_model", remembering)
        result = train(config(files, "whole", teacher_base=str(files / "plain")))
    gc.collect()
    return files, result, [*counts, len(alive)]


@pytest.fixture(scope="module")
def taught(saved, tmp_path_factory):
    """A head from a teacher alone."""
    files = tmp_path_factory.mktemp("taught") / "files"
    shutil.copytree(saved, files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARA_CACHE_DIR", str(files / "cache"))
        return train(config(files, eval_prompts=0)).head


def test_an_interrupted_run_ends_with_the_head_of_an_uninterrupted_one(files, from_two, interrupting):
    base = {"teacher_base": str(files / "plain")}
    others, whole, _ = from_two
    with pytest.raises(KeyboardInterrupt):
        train(config(files, "cut", **base), reporter=interrupting("base replies by its base model", 1))

    cut = train(config(files, "cut", **base))

    assert weights(files, "cut") == weights(others, "whole")
    assert cut.kl_per_token == whole.kl_per_token <= METHODS["teacher"].kl_budget + 1e-6
    head = MARAHead.from_pretrained(files / "cut").config
    assert (head.method, head.form, head.teacher, head.teacher_base) == ("teacher", "q", "tuned", "plain")
    assert {"weights of the teacher", "weights of the base model of the teacher"} < head.origin.hashes.keys()
    assert str(files) not in head.origin.command and "--teacher tuned --teacher-base plain" in head.origin.command
    card = (files / "cut" / "README.md").read_text()
    assert "Its teacher is `tuned`, which was tuned from `plain`." in card and "nats a token" in card


def test_teachers_are_loaded_one_after_the_other_and_given_back(from_two):
    assert from_two[2] == [*[1] * 6, 0], "each to look at it, to read replies of the base model, and of the head"


def test_the_head_moves_replies_towards_what_the_teacher_prefers(files):
    more = {"max_replies": 64, "epochs": 20, "kl_budget": 1.0, "inner_size": 64}
    agreement = train(config(files, **more)).head.config.metrics["teacher_agreement"]

    assert agreement["head"] > agreement["base"] + 0.05


@pytest.mark.parametrize("teacher_base", [None, "plain"])
def test_what_is_learned_is_the_difference_of_two_models(files, teacher_base):
    settings = config(files, teacher_base=teacher_base and str(files / teacher_base))
    plan = make_plan(settings)
    run = start(settings, plan, Identity.of(settings, plan), Reporter())
    prompts = limited_prompts(run, plan.train)
    untrained = run.new_head().eval()
    side = Side.of("base", prompts, generate_replies(run, "base", prompts, 1, 0, untrained, is_base=True))

    values = differences(run, [side])[0].values

    models = [tiny_model(seed=1), tiny_model(seed=2 if teacher_base else 0)]

    def expected(row):
        """But for the scale, by a forward over the whole text."""
        reply = side.generated[int(side.positions.replies[row])]
        before = reply.token_ids[: int(side.positions.places[row])]
        ids = [*run.model.encoder.encode(prompts[reply.prompt_index]), *before]
        with torch.inference_mode():
            taught, plain = (model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for model in models)
        live = side.positions.live[row]
        gap = (taught - plain)[side.positions.token_ids[row][live]]
        return gap - (side.positions.log_probs[row][live].softmax(-1) * gap).sum()

    rows = range(0, len(values), 3)
    found = torch.cat([values[row][side.positions.live[row]] for row in rows])
    wanted = torch.cat([expected(row) for row in rows])
    scale = float((found @ wanted) / (wanted @ wanted))
    torch.testing.assert_close(found, scale * wanted, atol=1e-3, rtol=1e-3)
    assert scale > 0


def test_with_a_sentence_the_teacher_reads_under_it(files, taught):
    kind = train(config(files, "kind", eval_prompts=2, principle="Be kind.")).head

    assert differ(taught, kind)
    assert kind.config.metrics["contrast"] == "the base model under a neutral sentence"
    assert len(kind.config.metrics["prompt_baseline"]["rows"]) == 8
    assert (
        "own replies under the sentence, against the base model under a neutral"
        in (files / "kind" / "README.md").read_text()
    )


def test_a_teacher_with_other_weights_is_another_run(files, taught):
    tiny_model(seed=5).save_pretrained(files / "tuned")

    other = train(config(files, eval_prompts=0)).head

    hashes = [head.config.origin.hashes["weights of the teacher"] for head in (taught, other)]
    assert hashes[0] != hashes[1] and differ(taught, other)


def test_a_dry_run_counts_the_larger_teacher_and_writes_nothing(files):
    tiny_model(seed=1, num_hidden_layers=6).save_pretrained(files / "tuned")
    alone = dry_run(config(files, teacher=str(files / "plain")))

    estimate = dry_run(config(files, teacher_base=str(files / "plain")))

    assert estimate.model_bytes > alone.model_bytes and not (files / "head").exists()
    assert estimate.expected.tokens_fed > alone.expected.tokens_fed


def test_without_data_the_shipped_prompts_are_used(files):
    plan = make_plan(config(files, data=None))

    assert (plan.method.name, len(plan.train) + len(plan.held_out)) == ("teacher", 320)


def test_another_vocabulary_is_refused_before_anything_is_generated(files):
    folder = files / "tuned"
    stored = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(stored))

    with pytest.raises(ConfigError, match=r"another vocabulary.*'b' there and 'a' here; 2 of 256 tokens") as caught:
        train(config(files))

    assert "same family" in caught.value.hint and not (files / "head").exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"teacher": "tiny"}, ConfigError, "are the same model"),
        ({"teacher_base": "tuned"}, ConfigError, "are the same model"),
        ({"teacher": "nowhere"}, ModelError, "nowhere"),
    ],
)
def test_what_can_not_teach_is_refused_before_the_work(files, settings, error, message):
    named = {role: str(files / name) for role, name in settings.items()}

    with pytest.raises(error, match=message):
        train(config(files, **named))
    assert not (files / "head").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": None, "teacher_base": "plain"}, "has no teacher"),
        ({"forbid": ["no"]}, "either a teacher or forbidden words"),
        ({"method": "principle", "principle": ["Be kind."]}, "method 'principle' needs a sentence"),
        ({"teacher": None, "method": "teacher"}, "do not say what a good reply is"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(files, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(config(files, **settings))


def test_an_adapter_teaches_what_its_fine_tune_changed(files):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses what transformers will drop
        tuned = peft.get_peft_model(tiny_model(), settings)
    tuned.peft_config["default"].base_model_name_or_path = str(files / "tiny")
    tuned.save_pretrained(files / "adapter")

    head = train(config(files, teacher=str(files / "adapter"))).head

    assert head.config.teacher == "adapter" and head.config.metrics["teacher_agreement"]["base"] < 0


def test_an_adapter_without_peft_is_named_at_once(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    (files / "adapter").mkdir()
    (files / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(files / "tiny")})
    )

    with pytest.raises(MissingExtraError, match="a LoRA adapter needs peft") as caught:
        train(config(files, teacher=str(files / "adapter")))

    assert caught.value.hint == "pip install 'mara-integrations[peft]'"
