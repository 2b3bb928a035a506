"""Training: labels, targets, fits and scales follow their laws; a run leaves a head that works, or nothing."""

from __future__ import annotations

import json
import random
from collections import Counter
from importlib import import_module
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.scheduler import Scheduler
from mara_integrations.errors import ConfigError, DataError, OutputError, RewardError
from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Message
from mara_integrations.models import int8
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.progress import ConsoleReporter, Reporter
from mara_integrations.rewards import ForbiddenWords
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.learning.fit import FitSettings
from mara_integrations.training.learning.objectives import RULE_DEPTH, rule_loss, value_loss
from mara_integrations.training.methods.rule import offending_tokens, rule_table
from mara_integrations.training.methods.value import advantages, fit_value, reply_values
from mara_integrations.training.plan import make_plan
from mara_integrations.training.registry import AUTO, MANY_PAIRS, METHODS
from mara_integrations.training.rollouts.replies import GivenReply, Reply, read_replies, sample_replies, token_texts
from mara_integrations.training.run import train
from mara_integrations.training.scoring.scale import PositionScores, scale_for_budget, score_positions
from mara_integrations.training.settings.main import MethodName

STORE = "mara_integrations.training.records.store"


@pytest.fixture(scope="module")
def model():
    return load_model(ModelSpec((tiny_model(), tiny_tokenizer())))


def config(folder_model, prompts_file, output, **values):
    settings = {"max_reply_tokens": 12, "replies_each": 2, "epochs": 5, "inner_size": 64, "eval_prompts": 3} | values
    return TrainConfig.of(model=folder_model, data=prompts_file, output=output, **settings)


# --- labels and targets ---


def test_the_token_that_completes_a_violation_offends():
    rule = ForbiddenWords(["you", "do it"])
    assert offending_tokens(["So", "So you", "So you do", "So you do it", "So you do it."], rule) == [
        False, True, False, True, False,
    ]  # fmt: skip
    assert offending_tokens(["yo", "you", "your", "your own"], rule) == [False, True, False, False]
    assert offending_tokens(["a you", "a you b you"], rule) == [True, True], "each violation has its token"


def test_unfinished_characters_do_not_hide_what_follows(model):
    ids = model.tokenizer("aé b").input_ids
    assert token_texts(model, ids)[-1] == model.tokenizer.decode(ids)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-5, 5)), min_size=2, max_size=20))
def test_advantages_do_not_depend_on_the_prompt(pairs):
    pairs = [(prompt, reward) for prompt, reward in pairs for _ in range(2)]  # every prompt has two replies
    replies = [Reply(prompt, "", (), torch.zeros(1, 1)) for prompt, _ in pairs]
    plain = advantages(replies, [reward for _, reward in pairs])
    shifted = advantages(replies, [reward + 7.0 * prompt for prompt, reward in pairs])
    assert shifted == pytest.approx(plain, abs=1e-3)
    for prompt in {prompt for prompt, _ in pairs}:
        assert sum(a for a, (p, _) in zip(plain, pairs, strict=True) if p == prompt) == pytest.approx(0, abs=1e-3)


def test_a_value_of_the_true_odds_is_the_best():
    targets = torch.tensor([1.0, 1.0, 1.0, 0.0])
    at = [float(value_loss(torch.full((4,), v), targets, torch.ones(4), is_binary=True)) for v in (0.5, 1.0986, 2.0)]
    assert at[1] == min(at)


def test_rule_loss_is_zero_where_all_is_as_it_should_be():
    offends = torch.tensor([True, False, False])
    assert float(rule_loss(torch.tensor([-RULE_DEPTH - 3, 0.0, 0.0]), offends)) == 0
    assert float(rule_loss(torch.zeros(3), offends)) == pytest.approx(1.0)
    assert float(rule_loss(torch.tensor([-RULE_DEPTH, 0.0, -2.0]), offends)) > 0
    assert float(rule_loss(torch.zeros(2), torch.tensor([False, False]))) == 0


# --- gathering ---


def test_read_and_sampled_states_of_a_reply_agree(model):
    prompts = [(Message("user", text),) for text in ("a", "longer than that", "b?")]
    sampling = SamplingParams(max_new_tokens=7, temperature=1.0)
    decoder = Decoder(make_backend(model.model), Scheduler(max_live=2))
    sampled = sample_replies(model, decoder, prompts, sampling=sampling, replies_per_prompt=2, seed=3)
    assert [reply.prompt_index for reply in sampled] == [0, 0, 1, 1, 2, 2]
    assert len({reply.token_ids for reply in sampled}) > 3, "replies differ by their seeds"
    for reply in sampled:
        assert reply.states.shape == (len(reply.token_ids) + 1, 32)
        text = model.tokenizer.decode(reply.token_ids)
        if model.tokenizer(text).input_ids == list(reply.token_ids):  # random bytes may not survive the round trip
            read = read_replies(
                model, decoder.backend, [GivenReply(0, prompts[reply.prompt_index], text)], max_tokens=99
            )[0]
            torch.testing.assert_close(read.states, reply.states, rtol=2e-2, atol=2e-2)


def test_rule_tables_hold_visited_candidates_of_gated_replies(model):
    prompts = [(Message("user", "a"),), (Message("user", "b"),)]
    decoder = Decoder(make_backend(model.model))
    sampling = SamplingParams(max_new_tokens=6, temperature=1.0)
    head = random_head(32, "residual")
    replies = sample_replies(model, decoder, prompts, sampling=sampling, head=head, keep_positions=True)
    rule = ForbiddenWords([chr(33 + i) for i in range(15)])  # punctuation: about every seventh token
    table = rule_table(model, replies, rule)
    visited = sum(len(position.states) - 1 for reply in replies for position in reply.positions)
    assert len(table) == sum(len(reply.token_ids) for reply in replies) + visited and visited > 0


# --- fitting and scale ---


def planted_replies(n, seed):
    """States in which the first coordinate tells good replies from bad."""
    generator = torch.Generator().manual_seed(seed)
    replies, labels = [], []
    for i in range(n):
        label = float(i % 2)
        states = torch.randn(6, 16, generator=generator)
        states[1:, 0] += 2.0 * (2 * label - 1)
        replies.append(Reply(i // 2, "", tuple(range(5)), states.half()))
        labels.append(label)
    return replies, labels


def test_a_planted_value_is_found_and_orders_unseen_replies():
    torch.manual_seed(0)
    head = MARAHead(HeadConfig(form="value", hidden_size=16, inner_sizes=(64, 16)))
    held_out = planted_replies(40, 2)
    epochs = fit_value(
        head, planted_replies(200, 1), held_out, is_binary=True,
        settings=FitSettings(epochs=10, learning_rate=1e-3, batch_size=64), on_epoch=lambda epoch: None,
    )  # fmt: skip
    assert min(epoch.held_out_loss for epoch in epochs) < 0.6 * epochs[0].held_out_loss
    values = reply_values(head, held_out[0])
    good, bad = (sorted(v for v, y in zip(values, held_out[1], strict=True) if y == label) for label in (1.0, 0.0))
    assert good[5] > bad[-5], "but for a few, every good reply is valued above every bad one"


def test_the_best_epoch_is_kept():
    torch.manual_seed(0)
    head = MARAHead(HeadConfig(form="value", hidden_size=16, inner_sizes=(64, 16)))
    noise = (planted_replies(8, 1)[0], [float(i % 3 == 0) for i in range(8)])
    epochs = fit_value(
        head, noise, planted_replies(40, 2), is_binary=True,
        settings=FitSettings(epochs=12, patience=3, learning_rate=3e-3), on_epoch=lambda epoch: None,
    )  # fmt: skip
    best = min(epochs[1:], key=lambda epoch: epoch.held_out_loss)
    assert epochs[-1].epoch - best.epoch == 3 or epochs[-1].epoch == 12
    from mara_integrations.training.methods.value import value_table

    table = value_table(*planted_replies(40, 2))
    with torch.no_grad():
        loss = value_loss(head(table.states.float())[:, 0], table.targets, table.weights, is_binary=True)
    assert float(loss) == pytest.approx(best.held_out_loss, rel=1e-4)


@given(st.integers(0, 100), st.floats(0.01, 0.5))
def test_the_scale_spends_the_budget_and_no_more(seed, budget):
    generator = torch.Generator().manual_seed(seed)
    scores, hazards = torch.randn(2, 9, 5, generator=generator)
    live = torch.arange(5) < torch.randint(2, 6, (9, 1), generator=generator)
    positions = PositionScores("residual", scores, hazards, live)
    scale = scale_for_budget(positions, budget, num_tokens=12)
    kl = float(positions.kl(scale).sum()) / 12
    assert kl <= budget + 1e-4
    if scale < 99:
        assert kl == pytest.approx(budget, rel=0.02)


def test_calibration_sees_every_candidate(model):
    decoder = Decoder(make_backend(model.model), Scheduler(feeds_all=True))
    untrained = MARAHead(HeadConfig(form="residual", hidden_size=32)).eval()
    sampling = SamplingParams(max_new_tokens=5, temperature=1.0)
    replies = sample_replies(
        model, decoder, [(Message("user", "a"),)], sampling=sampling, head=untrained, keep_positions=True
    )
    positions = [position for reply in replies for position in reply.positions]
    assert all(len(position.states) == len(position.token_ids) for position in positions)
    assert float(score_positions(untrained, positions).kl(50.0).abs().max()) < 1e-5


# --- whole runs ---


def test_a_rule_is_learnt_from_end_to_end(folder_model, prompts_file, tmp_path):
    model = load_model(ModelSpec(folder_model))
    decoder = Decoder(make_backend(model.model))
    prompts = [(Message("user", f"{i}?"),) for i in range(20)]
    base = sample_replies(model, decoder, prompts, sampling=SamplingParams(max_new_tokens=12, temperature=1.0))
    letters = Counter(
        c for reply in base for c in set(reply.text) if c.isascii() and not c.isalnum() and not c.isspace()
    )
    mark = letters.most_common(1)[0][0]  # what this random model likes to write
    result = train(config(folder_model, prompts_file, tmp_path / "h", forbid=(mark,), replies_each=4, epochs=20))
    comparison = next(iter(result.evaluation.rewards.values()))
    assert result.head.config.min_candidates == 2 and result.head.config.method == "rule"
    assert comparison.gated_compliance.mean >= comparison.base_compliance.mean
    lines = [json.loads(line) for line in (tmp_path / "h" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "start" and lines[-1]["event"] == "done"
    assert not (tmp_path / "h" / ".run").exists()
    loaded = MARAHead.from_pretrained(tmp_path / "h")
    assert (
        loaded.config.metrics["evaluation"]["rewards"] and "held-out prompts" in (tmp_path / "h/README.md").read_text()
    )


def test_a_reward_is_learnt_from_end_to_end(folder_model, prompts_file, tmp_path):
    reward = {"method": "value", "form": "value", "reward": "tests/reward_for_tests.py:vowels"}
    settings = {**reward, "replies_each": 4, "epochs": 30, "learning_rate": 1e-3}
    result = train(config(folder_model, prompts_file, tmp_path / "h", **settings))
    assert result.head.config.form == "value" and result.head.config.scale > 0
    assert result.kl_per_token <= 0.16 and result.held_out_accuracy is not None


def test_an_interrupted_run_goes_on_to_the_same_head(interrupting, folder_model, prompts_file, tmp_path):
    settings = {"forbid": tuple("!,.;?"), "max_reply_tokens": 8, "epochs": 2, "inner_size": 16, "eval_prompts": 0}
    whole = train(config(folder_model, prompts_file, tmp_path / "whole", **settings))
    for stage, after in (("held-out base replies", 2), ("sampled gated replies 1", 3)):
        with pytest.raises(KeyboardInterrupt):
            train(
                config(folder_model, prompts_file, tmp_path / "broken", **settings), reporter=interrupting(stage, after)
            )
        assert not (tmp_path / "broken" / "head.safetensors").exists(), "nothing half-trained looks like a head"
    resumed = train(config(folder_model, prompts_file, tmp_path / "broken", **settings))
    assert resumed.head.fingerprint == whole.head.fingerprint
    said = [metrics(tmp_path / name) for name in ("whole", "broken")]
    assert [line for line in said[1] if line["event"] != "resumed"] == said[0], "all that the whole run says, once"
    assert len(said[1]) == len(said[0]) + 2


def metrics(folder):
    """Lines but for their times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    dropped = ("elapsed_s", "seconds", "run", "config")
    return [{name: value for name, value in line.items() if name not in dropped} for line in lines]


def test_reading_given_replies_goes_on_where_it_was(interrupting, folder_model, tmp_path, monkeypatch):
    monkeypatch.setattr("mara_integrations.training.collect.given._REPLIES_PER_FILE", 8)
    pairs = tmp_path / "p.jsonl"
    rows = [{"prompt": f"{i}?", "chosen": f"it is {i}", "rejected": f"no {i}"} for i in range(20)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"eval_prompts": 0, "epochs": 2, "inner_size": 16}
    whole = train(config(folder_model, pairs, tmp_path / "whole", **settings))
    monkeypatch.setattr(f"{STORE}.cache_dir", lambda: tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        train(config(folder_model, pairs, tmp_path / "broken", **settings), reporter=interrupting("given replies", 20))
    assert len(list((tmp_path / "cache").rglob("*.pt"))) == 2
    resumed = train(config(folder_model, pairs, tmp_path / "broken", **settings))
    assert resumed.head.fingerprint == whole.head.fingerprint


def test_the_plan_says_what_and_why(prompts_file, tmp_path):
    pairs, labelled = tmp_path / "p.jsonl", tmp_path / "l.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(9)))
    rows = [{"prompt": f"{i}", "completion": "a", "label": bool(i % 2)} for i in range(30)]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plans = {
        "9 preference pairs": TrainConfig.of(data=pairs, output=tmp_path / "o"),
        "30 replies are labelled": TrainConfig.of(data=labelled, output=tmp_path / "o"),
        "found token by token": TrainConfig.of(data=prompts_file, output=tmp_path / "o", forbid=["x"]),
        "the model's own replies will be scored by vowels": TrainConfig.of(
            data=prompts_file, output=tmp_path / "o", reward="tests/reward_for_tests.py:vowels"
        ),
    }
    for words, settings in plans.items():
        plan = make_plan(settings)
        expected = "rule" if settings.forbid else "rloo" if settings.reward else "value"
        assert words in plan.why and plan.method.name == expected
        assert {row.prompt for row in plan.train.rows}.isdisjoint({row.prompt for row in plan.held_out.rows})
    assert not (tmp_path / "o").exists(), "planning writes nothing"


def test_many_pairs_are_taught_by_a_model_of_them(tmp_path):
    def planned(count, **settings):
        pairs = tmp_path / f"{count}.jsonl"
        rows = ({"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(count))
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return make_plan(TrainConfig.of(data=pairs, output=tmp_path / "o", **settings))

    plan = planned(MANY_PAIRS)
    assert plan.method.name == "reward-model" and f"a reward model of {MANY_PAIRS} preference pairs" in plan.why
    assert planned(MANY_PAIRS, method="value").method.name == planned(MANY_PAIRS - 1).method.name == "value"
    with pytest.raises(ConfigError, match="form='paper' is not allowed: method 'value'"):
        planned(MANY_PAIRS, form="paper")


def test_every_method_has_a_loop_and_a_name_on_the_command_line():
    assert set(METHODS) == set(get_args(MethodName)) - {"auto"}
    for method in METHODS.values():
        module, _, function = method.loop.partition(":")
        assert callable(getattr(import_module(module), function)) and callable(import_module(module).work)
    assert {METHODS[name].learns_from.count(source) for source, name in AUTO.items()} == {1}


def test_what_can_not_work_is_refused_before_anything_is_loaded(prompts_file, tmp_path):
    good = tmp_path / "good.jsonl"
    rows = [{"prompt": f"{i}", "completion": "a", "label": True} for i in range(9)]
    good.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one_good_prompt = tmp_path / "one.jsonl"
    rows = [{"prompt": "A?" if i < 5 else f"B{i}?", "completion": f"{i}", "label": i < 5} for i in range(30)]
    one_good_prompt.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "file").write_text("")
    cases = [
        (DataError, "all replies labelled good answer the same prompt", {"data": one_good_prompt, "method": "kto"}),
        (ConfigError, "prompts alone", {"data": prompts_file}),
        (DataError, "labelled bad", {"data": good}),
        (ConfigError, "either a reward or forbidden words", {"data": good, "reward": "a:b", "forbid": ["x"]}),
        (ConfigError, "'rule' needs a rule", {"data": good, "method": "rule"}),
        (
            ConfigError,
            "'value' needs .*; given are a rule",
            {"data": prompts_file, "method": "value", "forbid": ["x"]},
        ),
        (ConfigError, "kl_budget=-1", {"data": good, "kl_budget": -1}),
        (RewardError, "nowhere", {"data": prompts_file, "reward": "nowhere:f"}),
        (OutputError, "is a file", {"data": prompts_file, "forbid": ["x"], "output": tmp_path / "file" / "h"}),
    ]
    for error, words, values in cases:
        with pytest.raises(error, match=words):
            make_plan(TrainConfig.of(**{"output": tmp_path / "o", **values}))


def test_words_that_never_occur_teach_nothing(folder_model, prompts_file, tmp_path):
    with pytest.raises(DataError, match=r"none of .* replies has what is forbidden"):
        train(config(folder_model, prompts_file, tmp_path / "h", forbid=("supercalifragilistic",)))
    assert not (tmp_path / "h" / "head.safetensors").exists()


@pytest.mark.parametrize(
    ("capabilities", "settings", "taken"),
    [
        ({"avx512_bf16": True}, {}, "bfloat16"),
        ({"amx_bf16": True}, {}, "bfloat16"),
        ({"avx512_bf16": True}, {"dtype": "float32"}, "float32"),
        pytest.param(
            {"avx512_bf16": True},
            {"quantization": "int8"},
            "int8",
            marks=pytest.mark.skipif(bool(int8._processor_problem()), reason="no int8 on this processor"),
        ),
        ({}, {}, "float32"),
    ],
)
def test_training_takes_bfloat16_where_the_processor_multiplies_it(
    folder_model, prompts_file, tmp_path, monkeypatch, capabilities, settings, taken
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    console = Console(record=True, width=120)
    with pytest.raises(DataError, match="none of"):
        unheard = config(folder_model, prompts_file, tmp_path / "h", forbid=("supercalifragilistic",), **settings)
        train(unheard, reporter=ConsoleReporter(console))
    said = console.export_text()
    assert f"on cpu, {taken}" in said
    assert ("Format bfloat16" in said) is (taken == "bfloat16")


# --- what is said before anything is loaded ---


def test_little_data_and_held_out_prompts_that_are_hardly_new_are_said_aloud(tmp_path):
    def warnings(prompts):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        return make_plan(TrainConfig.of(data=path, output=tmp_path / "h", forbid=["x"])).warnings

    assert any("3 rows are few" in each for each in warnings(["What?", "Why then?", "How so?"]))
    templates = [f"How do I return the {thing} I bought?" for thing in map(str, range(40))]
    assert any("6 of 6 held-out prompts differ from a prompt to fit on" in each for each in warnings(templates))
    words = [f"{start}{end}" for start in ("ba", "ki", "lo", "mu", "ne", "so") for end in ("n", "rt", "sk", "ll", "x")]
    varied = [" ".join(random.Random(i).sample(words, 6)) for i in range(40)]
    assert warnings(varied) == ()


@pytest.mark.parametrize("length", [600, 200_000])
def test_a_prompt_that_leaves_no_room_for_a_reply_is_named_before_the_model_is_loaded(
    folder_model, prompts_file, tmp_path, monkeypatch, length
):
    with prompts_file.open("a") as file:
        file.write(json.dumps({"prompt": "word " * length}) + "\n")
    monkeypatch.setattr("mara_integrations.training.run.load_model", lambda spec: pytest.fail("it is loaded"))
    with pytest.raises(
        DataError, match=r"prompts.jsonl:21: the prompt is too long \(1 prompt leaves no room .*of 512 tokens"
    ):
        train(config(folder_model, prompts_file, tmp_path / "h", forbid=["e"]))
    assert not (tmp_path / "h").exists()


def test_prompts_that_leave_no_room_can_be_left_out(folder_model, prompts_file, tmp_path):
    with prompts_file.open("a") as file:
        file.writelines(json.dumps({"prompt": f"{i} " + "word " * 600}) + "\n" for i in range(9))
    small = {"max_reply_tokens": 8, "epochs": 1, "inner_size": 16, "eval_prompts": 9}
    settings = {"forbid": tuple("!,.;?"), "skip_bad_rows": True, **small}
    said = []
    reporter = Reporter()
    reporter.say = said.append
    result = train(config(folder_model, prompts_file, tmp_path / "h", **settings), reporter=reporter)
    assert any("left out: 9 prompts leave no room for replies of 8 tokens" in line for line in said)
    assert len(result.evaluation.examples) <= 9
    origin = result.head.config.origin
    assert origin.num_rows + origin.num_held_out_rows == 20
