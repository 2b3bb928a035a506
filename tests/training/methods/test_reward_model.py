"""`reward-model`: both reward models find what was planted, know nothing of length, and teach a head by `rloo`."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from mara_integrations.cli import app
from mara_integrations.errors import ConfigError, DataError, HeadError, RewardError
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.rewards import reward_name
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.methods.reward_model import preferences
from mara_integrations.training.plan import make_plan
from mara_integrations.training.rollouts.workers import LocalWorker
from mara_integrations.training.run import train
from mara_integrations.training.scoring.fitted_reward import (
    EmbeddingReward,
    LabelledText,
    NGramReward,
    RewardModel,
    fit_logistic,
)
from mara_integrations.training.scoring.held_out import reward_accuracy
from mara_integrations.training.scoring.reward_files import copy_rewards, keep_rewards, kept_reward


@pytest.fixture(scope="module")
def model():
    return load_model(ModelSpec((tiny_model(), tiny_tokenizer())))


def planted(count, seed):
    """Pairs whose better reply has an "aye" in it, whose worse one a "nay"."""
    draw = random.Random(seed)

    def reply(word):
        words = [draw.choice(["so", "it", "was", "then", "and"]) for _ in range(draw.randint(3, 9))]
        return " ".join([*words, word, *words[:2]])

    return [(reply("aye"), reply("nay")) for _ in range(count)]


def test_bradley_terry_finds_the_log_odds():
    """One feature that wins three times in four: its weight is ln 3, but for the decay."""
    signs = torch.tensor([1.0, 1.0, 1.0, -1.0]).repeat(100)
    weights = fit_logistic(lambda w: signs * w[0], 1, len(signs), seed=0)
    assert float(weights[0]) == pytest.approx(1.0986, abs=0.15)


def test_both_kinds_order_unseen_pairs(model):
    pairs, unseen = planted(80, 1), planted(60, 2)
    assert reward_accuracy(NGramReward.fit(pairs, 0), unseen).mean > 0.95
    assert reward_accuracy(EmbeddingReward.fit(pairs, 0, model), unseen).mean > 0.8
    assert reward_accuracy(RewardModel.fit(pairs, 0, model), unseen).mean > 0.95
    shuffled = [pair if i % 2 else pair[::-1] for i, pair in enumerate(pairs)]
    assert reward_accuracy(NGramReward.fit(shuffled, 0), unseen).mean < 0.8, "there is nothing to find"


def test_what_both_views_say_counts_alike(model):
    pairs = planted(80, 1)
    reward, texts = RewardModel.fit(pairs, 0, model), [text for pair in pairs for text in pair]
    said = (torch.tensor(reward.words(texts)), torch.tensor(reward.embeddings(texts)))
    shares = [view / deviation for view, deviation in zip(said, reward.deviations, strict=True)]
    assert [float(share.std(correction=0)) for share in shares] == pytest.approx([1.0, 1.0])
    assert reward(texts) == pytest.approx(sum(shares).tolist(), abs=1e-5)


def test_a_reply_said_twice_is_worth_the_same():
    reward = NGramReward.fit(planted(80, 1), 0)
    once, twice, messages = reward(["aye , so", "aye , so aye , so", [{"role": "assistant", "content": "aye , so"}]])
    assert once == messages and 0.5 < twice / once < 1.5
    assert reward([""]) == [0.0]


def labelled(count, seed):
    """Replies that are good with an "aye" in them; prompts about the sea mostly have good ones, about tax bad ones."""
    draw = random.Random(seed)
    examples = []
    for i in range(count):
        is_good = i % 2 == 0
        topic = "sea" if is_good is (draw.random() < 0.85) else "tax"
        words = [draw.choice(["so", "it", "was", "then", "and"]) for _ in range(6)]
        reply = " ".join([topic, *words, "aye" if is_good is (draw.random() < 0.85) else "nay"])
        examples.append(LabelledText(f"tell me about the {topic} {words[0]}", reply, is_good))
    return examples


def test_labels_of_single_replies_teach_what_good_replies_have_more_than_their_topics(model):
    examples = labelled(240, 1)
    better = [("tax it was then aye", "tax it was then nay"), ("sea it was then aye", "sea it was then nay")]
    topics = [("sea it was then so", "tax it was then so")]
    reward = NGramReward.fit(examples, 0)
    for fitted in (reward, RewardModel.fit(examples, 0, model)):
        assert reward_accuracy(fitted, better).mean == 1.0

    def gap(reward, pair):
        good, bad = reward([pair[0], pair[1]])
        return good - bad

    assert gap(reward, better[0]) > 1.5 * gap(reward, topics[0]), "half of what a topic tells is the prompt's merit"


def test_labels_are_not_paired_across_prompts(model, tmp_path):
    rows = [{"prompt": f"{i}?", "completion": f"reply {i}", "label": i % 2 == 0} for i in range(20)]
    (tmp_path / "thumbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig.of(data=tmp_path / "thumbs.jsonl", output=tmp_path / "h", method="reward-model")
    plan = make_plan(config)
    run = SimpleNamespace(plan=plan, model=model, config=config)
    examples = preferences(run, plan.train.rows)
    assert all(isinstance(example, LabelledText) for example in examples)
    assert {(example.prompt, example.reply) for example in examples} <= {(f"{i}?", f"reply {i}") for i in range(20)}


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_a_head_is_taught_by_the_model_of_the_preferences(folder_model, tmp_path, kind):
    rows = []
    for i, (better, worse) in enumerate(planted(100 if kind == "pairs" else 50, 3)):
        if kind == "pairs":
            rows.append({"prompt": f"{i}?", "chosen": better, "rejected": worse})
        else:
            rows += [{"prompt": f"{i}?", "completion": c, "label": y} for c, y in ((better, True), (worse, False))]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {
        "max_reply_tokens": 8,
        "epochs": 1,
        "inner_size": 16,
        "eval_prompts": 3,
        "max_replies": 16,
        "replies_each": 2,
        "rounds": 0,
    }
    result = train(TrainConfig.of(model=folder_model, data=data, output=tmp_path / "h", method="reward-model", **small))
    assert set(result.evaluation.rewards) == {"reward model", "second judge"}
    assert result.head.config.method == "reward-model"
    lines = [json.loads(line) for line in (tmp_path / "h" / "metrics.jsonl").read_text().splitlines()]
    judged = [line for line in lines if line["event"] == "held-out comparison"]
    assert len(judged) == 1 and list(judged[0]["rewards"]) == ["reward model", "second judge"]
    assert "`rewards/second-judge.safetensors`" in (tmp_path / "h" / "README.md").read_text()

    asking = ["eval", "--head", tmp_path / "h", "--model", folder_model, "--data", data, "--max-new-tokens", "8"]
    report = tmp_path / "report.json"
    said = CliRunner().invoke(app, [*map(str, asking), "--limit", "3", "--temperature", "1", "--report", str(report)])
    assert "Rewards reward model; second judge (recorded with the head)" in " ".join(said.stdout.split()), said.output
    again, then = json.loads(report.read_text())["rewards"], result.evaluation.rewards
    assert [again[name]["base_mean"] for name in then] == pytest.approx([then[name].base_mean for name in then])


def test_a_merged_head_keeps_the_reward_models_of_all(model, tmp_path):
    heads = {}
    for number, (folder, name) in enumerate([("a/voice", "mine"), ("b/voice", "mine"), ("c/safety", "other")]):
        head = random_head(32, "residual", seed=number)
        rewards = {name: RewardModel.fit(planted(40, number), number, model)}
        keep_rewards(tmp_path / folder, head, rewards)
        head.save_pretrained(tmp_path / folder)
        heads[str(tmp_path / folder)] = head
    merged, want = random_head(32, "residual"), heads[str(tmp_path / "b/voice")].config.rewards[0]

    copy_rewards(tmp_path / "merged", merged, heads)

    kept = [kept_reward(spec, [tmp_path / "merged"], model) for spec in merged.config.rewards]
    assert [reward_name(reward) for reward in kept] == ["voice mine", "voice mine 2", "other"]
    texts = {"prompts": ["?"] * 2, "completions": ["it was aye", "it was nay"]}
    assert kept[1](**texts) == kept_reward(want, [tmp_path / "b/voice"], model)(**texts)


def test_a_kept_reward_model_judges_as_it_did(model, tmp_path):
    reward, unseen = RewardModel.fit(planted(80, 1), 0, model), [text for pair in planted(9, 2) for text in pair]
    head = random_head(32, "residual")
    keep_rewards(tmp_path, head, {"mine": reward, "not kept": len})
    (spec,) = head.config.rewards
    loaded = kept_reward(spec, [tmp_path / "elsewhere", tmp_path], model)
    assert reward_name(loaded) == "mine" and loaded(unseen) == reward(unseen)
    with pytest.raises(RewardError, match=r"width 32; those of .* have 16"):
        kept_reward(spec, [tmp_path], load_model(ModelSpec((tiny_model(hidden_size=16), tiny_tokenizer()))))
    (tmp_path / spec["file"]).write_bytes(b"another")
    with pytest.raises(HeadError, match="is not the file that the head's config describes"):
        kept_reward(spec, [tmp_path], model)
    (tmp_path / spec["file"]).unlink()
    with pytest.raises(RewardError, match="'mine' is not beside the head"):
        kept_reward(spec, [tmp_path], model)


@pytest.mark.parametrize(("method", "count"), [("value", 30), ("dpo", 30), ("kto", 30), ("value", 12)])
def test_what_heads_fitted_to_pairs_write_is_judged_by_a_model_of_the_pairs(folder_model, tmp_path, method, count):
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i}?", "chosen": b, "rejected": w} for i, (b, w) in enumerate(planted(count, 3))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {"max_reply_tokens": 6, "epochs": 1, "inner_size": 16, "eval_prompts": 2}
    result = train(TrainConfig.of(model=folder_model, data=data, output=tmp_path / "h", method=method, **small))
    assert set(result.evaluation.rewards) == ({"reward model"} if count == 30 else set())
    assert [spec["name"] for spec in result.head.config.rewards] == (["reward model"] if count == 30 else [])


@pytest.mark.parametrize("method", ["reward-model", "value", "dpo", "kto"])
def test_replies_are_written_to_other_prompts_than_those_of_the_preferences(
    method, folder_model, prompts_file, tmp_path, monkeypatch
):
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"pair {i}?", "chosen": b, "rejected": w} for i, (b, w) in enumerate(planted(100, 3))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {"max_reply_tokens": 6, "epochs": 1, "inner_size": 16, "eval_prompts": 3, "max_replies": 16}
    config = TrainConfig.of(
        model=folder_model, data=data, output=tmp_path / "h", method=method, prompts=prompts_file, **small
    )
    asked, submit = [], LocalWorker.submit
    monkeypatch.setattr(
        LocalWorker, "submit", lambda workers, batch, on: asked.extend(batch.prompts) or submit(workers, batch, on)
    )
    result = train(config)
    known = {json.loads(line)["prompt"] for line in prompts_file.read_text().splitlines()}
    assert asked and {conversation.messages[-1].content for conversation in asked} <= known
    assert {example.prompt[-1].content for example in result.evaluation.examples} <= known


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"method": "value", "form": "value"}, "form q"),
        ({"reward": "sentiment"}, "--data"),
        ({"forbid": ("you",)}, "--data"),
        ({"principle": ("Be kind.",)}, "--data"),
    ],
)
def test_other_prompts_are_refused_where_nothing_is_written_to_them(
    changes, hint, folder_model, prompts_file, tmp_path
):
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"pair {i}?", "chosen": b, "rejected": w} for i, (b, w) in enumerate(planted(100, 3))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig.of(model=folder_model, data=data, output=tmp_path / "h", prompts=prompts_file, **changes)
    with pytest.raises(ConfigError, match="learns from the prompts of the data") as refused:
        train(config)
    assert hint in refused.value.hint


def test_too_few_pairs_are_refused(folder_model, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i}?", "chosen": b, "rejected": w} for i, (b, w) in enumerate(planted(30, 3))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="too few for a reward model"):
        train(TrainConfig.of(model=folder_model, data=data, output=tmp_path / "h", method="reward-model"))
