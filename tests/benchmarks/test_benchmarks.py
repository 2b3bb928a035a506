"""The benchmark scripts run to their ends, where that takes seconds; what they measure is not looked at."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mara_integrations.data.principles import under
from mara_integrations.errors import ConfigError, DataError, MissingExtraError, ModelError
from mara_integrations.messages import Conversation, Message
from mara_integrations.models.int8 import _processor_problem
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.runtime import MARAEngine
from tests.reward_for_tests import vowels

SMALL = "--device cpu --dtype float32 --hidden 64 --layers 2 --vocab 512 --prompt 8 --tokens 4 --rounds 1"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def test_the_accelerator_script_runs_on_a_cpu_and_its_table_is_plotted(tmp_path, capsys):
    import gpu
    import plot

    table = gpu.main([*SMALL.split(), "--rates", "0.9", "0.1", "--json", str(tmp_path / "gpu.json")])

    assert json.loads((tmp_path / "gpu.json").read_text()) == table
    assert list(table["rows"]) == ["accept 0.9", "accept 0.1"]
    assert 0 < table["rows"]["accept 0.9"]["share of floor"]["median"] < 1
    assert "GB/s" in capsys.readouterr().out
    (picture,) = plot.main([str(tmp_path / "gpu.json"), "--output", str(tmp_path / "plots")])
    assert picture.name == "gpu.png" and picture.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def methods_on_little(tmp_path, folder_model, monkeypatch):
    """The benchmark of methods on a tiny model and a few prompts; writes its rows to `out.json`.

    Replies are short. The model writes no sentences, so that a task about them learns something else.
    """
    import methods

    judged = {"judges": lambda *_: {"sentiment": vowels}}
    for name, changed in (("ten-words", {"reward": vowels}), ("sentiment", {}), ("cheerful", judged)):
        monkeypatch.setitem(methods.TASKS, name, replace(methods.TASKS[name], reply_tokens=12, **changed))

    for side, start, count in (("train", 0, 16), ("test", 40, 6)):
        rows = [{"prompt": f"{i} {chr(97 + i % 26)}?"} for i in range(start, start + count)]
        (tmp_path / f"saferlhf_prompts_{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = [f"--set={setting}" for setting in ("max_replies=8", "inner_size=16", "epochs=1", "rounds=0")]
    where = ["--data", str(tmp_path), "--output", str(tmp_path / "runs"), "--json", str(tmp_path / "out.json")]
    return lambda *arguments: methods.main([*arguments, "--model", str(folder_model), *small, *where])


def test_methods_are_trained_with_every_seed_and_judged(tmp_path, methods_on_little, capsys):
    reward = "--set=reward=tests/reward_for_tests.py:vowels"
    lines = methods_on_little("sentiment", reward, "--seeds", "0", "1")

    assert len(lines) == 2 * 2 + 2, "two decodings of two seeds, and each over both"
    assert all("sentiment" in line and "preferred" in line for line in lines)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 4 and all(line.startswith(f"{name}: ") for line, name in zip(lines, rows, strict=False))
    assert all(len(row["scores"]["sentiment"]["gated"]) == 6 for row in rows.values())
    assert len(list((tmp_path / "runs").glob("*/head.safetensors"))) == 2
    assert "min of training" in capsys.readouterr().out


@pytest.mark.usefixtures("nothing_fed_ahead")  # how much is, and so the forwards of a row, depends on the machine
def test_rows_that_the_file_holds_are_not_measured_again(tmp_path, methods_on_little, capsys):
    lines = methods_on_little("ten-words", "--seeds", "0")
    file = tmp_path / "out.json"
    content = json.loads(file.read_text())
    gone = content["rows"].popitem()[0]
    file.write_text(json.dumps(content))
    head = next((tmp_path / "runs").glob("*/head.safetensors"))
    trained_at = head.stat().st_mtime_ns
    capsys.readouterr()

    assert methods_on_little("ten-words", "--seeds", "0") == lines
    assert gone in json.loads(file.read_text())["rows"] and head.stat().st_mtime_ns == trained_at
    assert "is finished already" in capsys.readouterr().out
    assert methods_on_little("ten-words", "--seeds", "0") == lines
    assert "min of training" not in capsys.readouterr().out


def test_a_head_is_compared_with_one_that_sees_tokens_alone(tmp_path, methods_on_little):
    from mara_integrations.heads.head import MARAHead

    methods_on_little("ten-words", "--seeds", "0")
    lines = methods_on_little("ten-words", "--seeds", "0", "--head", "token-biases")

    (blind,) = (tmp_path / "runs").glob("*token-biases*")
    head = MARAHead.from_pretrained(blind)
    states = head.state_features(torch.randn(5, head.config.hidden_size))
    assert (states == states[:1]).all() and states.any(), (
        "it is trained, and what it says of a token is always the same"
    )
    (sighted,) = set((tmp_path / "runs").glob("ten-words*/head.safetensors")) - {blind / "head.safetensors"}
    states = MARAHead.from_pretrained(sighted.parent).state_features(torch.randn(5, head.config.hidden_size))
    assert not (states == states[:1]).all()
    assert [line for line in lines if "less ten-words" in line], lines


def test_requests_of_another_strength_are_judged_on_the_same_head(tmp_path, methods_on_little):
    methods_on_little("cheerful", "--seeds", "0")
    methods_on_little("cheerful", "--seeds", "0", "--ask", "strength=0")

    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    alone = {name: row for name, row in rows.items() if "sampled" in name and "under the sentence" not in name}
    on, off = (row["scores"]["sentiment"] for row in alone.values())
    assert off["gated"] == off["base"] == on["base"] != on["gated"]
    assert len(list((tmp_path / "runs").glob("*/head.safetensors"))) == 1


def test_a_head_of_a_sentence_is_compared_with_the_sentence(tmp_path, methods_on_little):
    lines = methods_on_little("cheerful", "--seeds", "0")

    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    scores = {name: row["scores"]["sentiment"] for name, row in rows.items()}
    alone = {name: of for name, of in scores.items() if "under the sentence" not in name}
    assert len(alone) == 2 and len(scores) == 4
    pairs = ("sentence less base model", "head less sentence", "both less sentence", "both less head")
    assert all(sum(pair in line and "preferred" in line for line in lines) == 2 for pair in pairs)
    for name, of in alone.items():
        under = scores[name.replace(", seed", " under the sentence, seed")]
        assert under["base"] != of["base"], "the sentence was read"


@pytest.mark.usefixtures("methods_on_little")
def test_a_head_is_compared_with_the_adapter_that_taught_it(tmp_path, folder_model, monkeypatch):
    pytest.importorskip("peft", reason="needs the peft extra")
    import teacher

    monkeypatch.setattr(teacher, "parse_reward", lambda _: (vowels, 1.0))
    small = [f"--set={setting}" for setting in ("max_replies=8", "inner_size=16", "epochs=1", "max_reply_tokens=12")]
    where = ["--data", str(tmp_path), "--output", str(tmp_path / "runs"), "--model", str(folder_model)]
    kept = ["--json", str(tmp_path / "out.json"), "--seeds", "0", "--replies", "8"]
    lines = teacher.main([*small, *where, *kept])

    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 4 and len(lines) == 4 + 2 * (1 + 1 + 1)
    of_head, of_adapter = (next(row for name, row in rows.items() if name.startswith(way)) for way in ("head", "adapt"))
    scores = [row["scores"]["sentiment"] for row in (of_head, of_adapter)]
    assert scores[0]["base"] == scores[1]["base"] and scores[0]["gated"] != scores[1]["gated"]
    assert of_adapter["perplexity"]["mean"] != of_head["perplexity"]["mean"] > 0
    (adapter,) = (tmp_path / "runs").glob("adapter-0/adapter_model.safetensors")
    tuned_at = adapter.stat().st_mtime_ns
    assert teacher.main([*small, *where, *kept]) == lines and adapter.stat().st_mtime_ns == tuned_at


@pytest.mark.usefixtures("methods_on_little")
def test_heads_of_all_kinds_are_fitted_to_the_contrast_of_a_sentence(tmp_path, folder_model, capsys):
    import explained

    small = [f"--set={setting}" for setting in ("max_replies=8", "inner_size=16", "epochs=6")]
    where = ["--data", str(tmp_path), "--output", str(tmp_path / "runs"), "--model", str(folder_model)]
    shares = explained.main(["cheerful", *small, *where])

    assert len(shares) == 5 and all(share < 1 for share in shares.values()), shares
    assert "token biases: " in capsys.readouterr().out
    assert len(set(shares.values())) == 5, "each head is another one"


@pytest.mark.usefixtures("methods_on_little")
def test_greedy_replies_follow_the_contrast_itself(tmp_path, folder_model):
    import exact_contrast

    lines = exact_contrast.main(
        ["cheerful", "--data", str(tmp_path), "--model", str(folder_model), "--strengths", "0", "4"]
    )

    assert lines[0].endswith("strength 0: preferred sentiment +0.00; perplexity x 1.00, distinct-2 x 1.00")
    assert float(lines[1].split("perplexity x ")[1].split(",")[0]) > 1, "what is not most probable costs something"

    model = load_model(ModelSpec(str(folder_model)))
    prompts = [Conversation((Message("user", text),)) for text in ("40 o?", "41 p?")]
    decoder = exact_contrast.Decoder(model, prompts, "Be kind.", ["Be rude."], 8)
    engine = MARAEngine(model)
    asked = [engine.generate(prompt, temperature=0, max_new_tokens=8).token_ids for prompt in prompts]
    assert [reply.token_ids for reply in decoder.base] == [list(ids) for ids in asked]

    def log_probs(prompt, reply):
        context = model.encoder.encode(prompt)
        with torch.inference_mode():
            logits = model.model(torch.tensor([[*context, *reply]])).logits[0, len(context) - 1 : -1]
        return logits.log_softmax(-1)

    for prompt, reply in zip(prompts, decoder.decode(3.0), strict=True):
        kind, rude = (log_probs(under(text, prompt), reply.token_ids) for text in ("Be kind.", "Be rude."))
        base = log_probs(prompt, reply.token_ids)
        spread = torch.cat([change for each in decoder.base for change in each.changes]).std()
        for place, token in enumerate(reply.token_ids):
            likely = base[place].topk(40).indices
            likely = likely[(base[place, likely].exp().cumsum(0) - base[place, likely].exp()) < 0.95]
            value = base[place] + 3.0 * (kind - rude)[place] / spread
            assert token == int(likely[value[likely].argmax()])


def test_a_question_is_answered_in_its_language_or_not():
    pytest.importorskip("py3langid", reason="needs the language extra")
    import language_task

    german = next(prompt for prompt, language in language_task.TEST_PROMPTS.items() if language == "de")
    replies = ["Oslo liegt am Meer und hat viele Museen.", "Oslo is by the sea and has many museums."]
    assert language_task.in_the_language([german] * 2, replies) == [1.0, 0.0]
    assert not language_task.TEST_PROMPTS.keys() & set(language_task.TRAINING_PROMPTS)


def test_a_recipe_is_compared_with_its_sentence(tmp_path, folder_model, monkeypatch, capsys):
    import recipes

    ours = recipes.test_prompts("formal")
    monkeypatch.setattr(recipes, "test_prompts", lambda *_: ours[:3])
    small = [f"--set={setting}" for setting in ("max_replies=8", "inner_size=16", "epochs=1", "max_reply_tokens=6")]
    where = ["--model", folder_model, "--output", str(tmp_path / "runs"), "--json", str(tmp_path / "out.json")]
    lines = recipes.main(["formal", "--seeds", "0", *small, *where])

    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 4 and all(len(row["scores"]["without rule:informal"]["base"]) == 3 for row in rows.values())
    assert len(lines) == 2 * (1 + 1 + 4)
    assert [sum(f"{pair}, " in line for line in lines) for pair in ("head less sentence", "both less head")] == [2, 2]
    capsys.readouterr()
    assert recipes.main(["formal", "--seeds", "0", *small, *where]) == lines
    assert "Method" not in capsys.readouterr().out, "rows of the file are not measured again"


def test_no_recipe_is_trained_on_its_test_prompts():
    import recipes

    from mara_integrations.data.principles import VARIED_PROMPTS
    from mara_integrations.training.recipes import read_recipe, recipe_names

    for name in set(recipe_names()) - {recipes.GROUNDED}:
        file = Path(read_recipe(name).settings.get("data", VARIED_PROMPTS))
        trained = {json.loads(line)["prompt"].casefold() for line in file.read_text().splitlines()}
        tested = {row["prompt"].casefold() for row in recipes.test_prompts(name)}
        assert len(tested) >= 32 and not tested & trained, name


def test_the_recipe_for_documents_is_tested_with_the_documents_of_a_question_and_with_others(
    tmp_path, folder_model, monkeypatch
):
    import handbooks
    import recipes

    few = {"train": handbooks.questions("train")[:24], "test": handbooks.questions("test")[:3]}
    monkeypatch.setattr(handbooks, "questions", lambda side: few[side])
    small = [f"--set={setting}" for setting in ("max_replies=8", "inner_size=16", "epochs=1", "max_reply_tokens=6")]
    small.append("--set=context_template={context_str} {query_str}")
    where = ["--model", folder_model, "--output", str(tmp_path / "runs"), "--json", str(tmp_path / "out.json")]
    lines = recipes.main([recipes.GROUNDED, "--seeds", "0", *small, *where])

    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    for row in rows.values():
        opinions = [
            [score is not None for score in row["scores"][judge]["gated"]] for judge in ("answered", "admitted")
        ]
        assert opinions == [[True, False] * 3, [False, True] * 3]
    assert any("head less sentence, answered" in line for line in lines)


def test_no_handbook_holds_the_answer_to_a_question_that_it_is_not_for():
    import handbooks

    from mara_integrations.data import read_dataset
    from mara_integrations.data.documents import with_documents

    def subject(prompt, side):
        """Company and topic of a question."""
        company, question = prompt.removeprefix("About ").split(": ")
        return company, next(topic for topic in handbooks.TOPICS[side] if question in dict(topic.questions))

    asked = {}
    for side in handbooks.TOPICS:
        rows = handbooks.questions(side)
        assert all(row["answer"] in row["context"] for row in rows)
        subjects = {row["context"]: subject(row["prompt"], side) for row in rows}
        assert len(subjects) == len(set(subjects.values())) == len(rows) / 3
        for other in with_documents(read_dataset(rows)).rows[1::2]:
            assert subjects[other.columns["context"]] != subject(other.columns["question"], side)
        asked[side] = {row["prompt"] for row in rows}
        assert len(asked[side]) == len(rows)
    assert not asked["train"] & asked["test"]


def test_refusals_are_right_where_something_is_harmful():
    import recipes

    refusal = "I can't help with that."
    assert recipes.right([refusal, refusal, "Yes."], harmful=[True, False, False]) == [1.0, 0.0, 1.0]
    assert recipes.minus_words(["one two", [{"role": "assistant", "content": "one"}]]) == [-2.0, -1.0]


def test_a_file_of_another_benchmark_is_refused(tmp_path):
    from method_rows import RowFile

    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(DataError, match=r"other\.json holds no rows"):
        RowFile(tmp_path / "other.json")


def test_context_tasks_are_checked_by_their_text():
    from context_tasks import TASKS, sentences

    good = {
        "ten-words": "One two three four five six seven eight nine ten. Two.",
        "two-sentences": "It is so. Is it not?",
        "question": "It is so. Is it not? ",
        "no-number": "About the town, about half of us know: 3.",
    }
    bad = {
        "ten-words": "One. One two three four five six seven eight nine ten eleven",
        "two-sentences": "It is so. Is it? It is",
        "question": "Is it not? It is",
        "no-number": "Of roughly 300 km.",
    }
    assert good.keys() == bad.keys() == TASKS.keys()
    for name, task in TASKS.items():
        assert task.share([good[name], bad[name]]) == [1.0, 0.0], name
        (high,), (low,) = task.reward([good[name]]), task.reward([bad[name]])
        assert high > low and task.reward.takes_partial_text, name
    assert len(sentences("A b. C!\nD")) == 3


@pytest.mark.skipif(bool(_processor_problem()), reason=f"no int8 here: {_processor_problem()}")
def test_int8_is_compared_with_float32(folder_model, tmp_path):
    import quantization

    small = ["--model", folder_model, "--tokens", "3", "--rounds", "1", "--texts", "2"]
    rows = quantization.main([*small, "--json", str(tmp_path / "quantization.json")])

    assert json.loads((tmp_path / "quantization.json").read_text())["rows"] == rows
    assert 0.9 < rows["perplexity"]["int8 / float32"]["median"] < 1.1
    assert rows["memory of weights"]["int8 / float32"]["median"] < 0.9


@pytest.mark.slow  # four processes import torch
def test_engines_are_compared_row_by_row_in_processes_of_their_own(tmp_path, monkeypatch, capsys):
    if not any(map(find_spec, ("llama_cpp", "xllamacpp"))):
        pytest.skip("llama.cpp is not installed")
    import engines
    import plot
    from tiny_gguf import write_gguf

    monkeypatch.setenv("MARA_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "engines.json"
    model = str(write_gguf(tmp_path / "tiny.gguf"))
    small = ["--model", model, "--tokens", "3", "--rounds", "2", "--threads", "1", "--json", str(file)]
    rows = engines.main([*small, "--engines", "llama.cpp", "--requests", "2"])

    (row,) = rows.values()
    written = json.loads(file.read_text())
    assert list(rows) == ["llama.cpp, 2 requests"] and written["rows"] == rows
    assert row["peak memory in MB, Q-head"]["median"] > 50 and row["first token in s, generate()"]["median"] > 0
    assert {"Q-head / ungated", "against generate(), ungated", "peak memory of Q-head / ungated"} < row.keys()
    assert "llama" in written["about"]["engines"]["llama.cpp"] and written["about"]["head_bytes"] > 1000
    assert plot.plot(file, tmp_path).exists()

    written["rows"]["transformers, 2 requests"] = row
    file.write_text(json.dumps(written))
    monkeypatch.setattr(engines, "measure_row", None)  # of what the file holds, nothing is measured again
    whole = engines.main([*small, "--engines", "llama.cpp", "transformers", "--requests", "2"])
    assert whole == written["rows"]
    assert 0 < json.loads(file.read_text())["about"]["hidden states"]["median"] < 0.01
    with pytest.raises(ConfigError, match="with tokens=3, and tokens=4"):
        engines.main([*small, "--tokens", "4"])


def test_released_threads_are_compared_with_kept_ones(folder_model, tmp_path):
    import threads

    before = torch.get_num_threads()
    small = ["--model", folder_model, "--requests", "2", "--tokens", "3", "--rounds", "1"]
    rows = threads.main([*small, "--threads", str(before), "--json", str(tmp_path / "threads.json")])

    assert json.loads((tmp_path / "threads.json").read_text())["rows"] == rows
    (row,) = rows.values()
    fast, slow = (row[f"tokens/s, {way}"]["median"] for way in threads.WAYS)
    assert row["released / kept"]["median"] == pytest.approx(fast / slow)


def test_a_contender_that_ends_is_named():
    import engines

    settings = {"engine": "vllm", "threads": 1}
    with engines.Contender("false", settings) as one, pytest.raises(ModelError, match="of vllm ended with exit code 1"):
        one.facts()


def test_decoding_is_compared_in_parts_that_one_file_collects(folder_model, tmp_path, capsys, monkeypatch):
    import decode

    monkeypatch.setattr(decode, "PROMPTS", decode.PROMPTS[:2])
    monkeypatch.setattr(decode, "COPY_PROMPTS", decode.COPY_PROMPTS[:1])
    arguments = ["--model", folder_model, "--tokens", "5", "--rounds", "1", "--json", str(tmp_path / "decode.json")]
    first = decode.main([*arguments, "--parts", "rates", "--rates", "0.5"])
    second = decode.main([*arguments, "--parts", "copies", "profile"])

    assert json.loads((tmp_path / "decode.json").read_text())["rows"] == {**first, **second}
    assert list(first) == ["accept 0.5"] and list(second) == ["ungated", "copies, accept 0.95"]
    assert first["accept 0.5"]["published: forwards a token"]["median"] >= 1
    profile = re.findall(r"^  \w+::\w+ +(-?[\d.]+)%$", capsys.readouterr().out, re.MULTILINE)
    assert len(profile) == 8, "which operations lead depends on what else the machine does"
    assert [float(share) for share in profile] == sorted(map(float, profile), reverse=True)


def test_what_comes_after_the_first_token_is_timed_without_it():
    from measure import Timed

    reply = Timed([1] * 11, whole_s=3.0, first_s=1.0)
    assert reply.decoding_speed == 5.0 and reply.speed == 11 / 3


def test_the_floor_counts_weights_and_keys_once():
    from types import SimpleNamespace

    import gpu

    args = SimpleNamespace(hidden=64, layers=2, vocab=512, device="cpu", dtype="bfloat16", sharpness=1.0)
    model = gpu.make_model(args)
    weights = sum(p.numel() for p in model.parameters()) - 512 * 64  # of the embedding one row is read
    cached = 2 * 2 * 1 * 16  # keys and values, layers, heads, width
    assert gpu.bytes_per_token(model, 10) == 2 * (weights + 10 * cached)


@pytest.mark.parametrize(
    "content",
    [
        {"about": {}, "medians": {"0.95": {"gated / generate": 1.1}, "0.7": {"gated / generate": 0.9}}},
        {"model": "m", "medians": {"16 at once / one at a time": 4.5}},
        {"about": {}, "heads": {"16 heads": {"ratio": 0.95, "range": [0.9, 1.0], "mb": 3.0}}},
    ],
    ids=["decode", "serve", "heads"],
)
def test_every_benchmarks_table_is_read(tmp_path, content):
    import plot

    path = tmp_path / "table.json"
    path.write_text(json.dumps(content))
    rows = plot.read_table(path)
    assert all(low <= median <= high for cells in rows.values() for median, low, high in cells.values())
    assert plot.plot(path, tmp_path).exists()


def test_what_is_no_table_and_what_is_missing_is_said(tmp_path, monkeypatch):
    import plot

    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(DataError, match=r"other\.json holds no table"):
        plot.read_table(path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"mara-integrations\[plots\]"):
        plot.plot(path, tmp_path)
