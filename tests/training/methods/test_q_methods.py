"""Q-heads learn from every kind of preference, from end to end on a tiny model."""

from __future__ import annotations

import json
import math

import pytest
import torch

from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.errors import ConfigError, DataError
from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.messages import Conversation, Message
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.rewards import parse_rule
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import tiny_model, tiny_tokenizer
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.methods.q_preference import LabelledPositions
from mara_integrations.training.methods.q_rule import label_candidates
from mara_integrations.training.plan import make_plan
from mara_integrations.training.records import store
from mara_integrations.training.rollouts.positions import Positions, positions_of_given
from mara_integrations.training.rollouts.replies import GivenReply, read_replies, sample_replies
from mara_integrations.training.rollouts.workers import LocalWorker
from mara_integrations.training.run import train
from mara_integrations.training.scoring import q_scale


@pytest.fixture
def files(tmp_path, folder_model):
    """A model, prompts, pairs and labelled replies: good ones have vowels."""
    pairs = [{"prompt": f"{i}?", "chosen": f"aeio u{i}a", "rejected": f"bcdf g{i}k"} for i in range(24)]
    labelled = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in pairs
        for name in ("chosen", "rejected")
    ]
    prompts = [{"prompt": f"{i} {chr(97 + i % 26)}?"} for i in range(48)]
    for name, rows in (("pairs", pairs), ("labels", labelled), ("prompts", prompts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def settings(files, data, output="head", **values):
    defaults = {"max_reply_tokens": 8, "epochs": 6, "inner_size": 64, "eval_prompts": 4, "form": "q"}
    return TrainConfig.of(
        model=str(files / "tiny"), data=files / f"{data}.jsonl", output=files / output, **defaults | values
    )


def early(completions, **_):
    """Share of characters in the first half of the alphabet; takes parts of replies."""
    return [sum(c in "abcdefghijklm" for c in text.lower()) / max(1, len(text)) for text in completions]


early.takes_partial_text = True


def vowels(completions, **_):
    """Another reward of that kind."""
    return [sum(c in "aeiou" for c in text.lower()) / max(1, len(text)) for text in completions]


vowels.takes_partial_text = True


def late(completions, **_):
    """The same for whole replies alone."""
    return early(completions)


def of_the_prompt(completions, prompts, **_):
    """A number of the prompt, whatever the reply."""
    return [float(sum(map(ord, prompt)) % 7) for prompt in prompts]


of_the_prompt.takes_partial_text = True


@pytest.mark.parametrize(("reward", "is_said"), [(early, False), (of_the_prompt, True)])
def test_a_reward_that_teaches_nothing_is_named(files, reward, is_said, notes):
    train(settings(files, "prompts"), reward=reward, reporter=notes)
    assert any("not shown to be better" in line for line in notes.lines) is is_said


@pytest.mark.parametrize(("reward", "rounds"), [(early, 0), (early, 1), (late, 1)], ids=["parts", "rounds", "whole"])
def test_a_reward_is_followed(files, reward, rounds, notes):
    config = settings(files, "prompts", method="rloo", rounds=rounds, max_replies=48, eval_prompts=8)

    result = train(config, reward=reward, reporter=notes)

    assert isinstance(result.head, QHead) and result.head.config.inner_sizes == (64, 16)
    assert 0 < result.kl_per_token < 0.3
    change = next(iter(result.evaluation.rewards.values()))
    assert change.gated_mean > change.base_mean
    assert any("greedy replies at strength" in line for line in notes.lines)


def test_a_budget_that_is_named_is_kept_to(files, notes):
    config = settings(files, "prompts", method="rloo", kl_budget=0.02, max_replies=48, eval_prompts=0)

    result = train(config, reward=early, reporter=notes)

    assert result.kl_per_token <= 0.021
    assert not any("greedy replies at strength" in line for line in notes.lines)


def test_base_replies_are_shared_by_all_rewards_and_not_by_heads_of_other_forms(files):
    def cached(output, reward, **values):
        small = {"max_replies": 24, "epochs": 1, "inner_size": 16, "eval_prompts": 0}
        train(settings(files, "prompts", output, **small, **values), reward=reward)
        return set(store.cache_dir().rglob("*.pt"))

    first = cached("one", early)
    assert cached("two", vowels) == first
    assert len(cached("three", early, form="residual") - first) == 2, "base replies, and held-out ones"


@pytest.mark.parametrize(("method", "data"), [("dpo", "pairs"), ("kto", "labels"), ("kto", "pairs")])
def test_pairs_and_thumbs_are_told_apart(files, method, data, notes):

    result = train(settings(files, data, method=method, learning_rate=3e-3), reporter=notes)

    assert result.head.config.form == "q" and result.head.config.method == method
    assert 0 < result.head.config.scale <= 1.0, "no stronger than it was fitted"
    assert result.held_out_accuracy.mean > 0.8, "vowels are easy to tell"
    assert any("are not candidates of the model" in line for line in notes.lines)


def test_labels_are_stepped_along(files):
    result = train(settings(files, "labels", method="value", max_replies=24))
    assert isinstance(result.head, QHead) and result.held_out_accuracy.mean > 0.8
    assert math.isfinite(result.kl_per_token) and result.kl_per_token > 0


@pytest.mark.parametrize("method", ["value", "dpo", "kto"])
@pytest.mark.parametrize("budget", [None, 0.01])
def test_replies_keep_perplexity_and_variety_unless_a_budget_is_named(files, method, budget):
    config = settings(files, "pairs", method=method, kl_budget=budget, learning_rate=3e-3, max_replies=24)

    result = train(config)

    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    events = {line["event"]: line for line in lines}
    assert ("greedy quality" in events) is (budget is None)
    assert events["scale"]["budget"] == (budget or 0.2)
    assert 0 < result.kl_per_token <= (budget or 0.2) + 1e-6
    assert result.head.config.scale == events["scale"]["scale"]


def test_the_scale_is_set_on_held_out_prompts_and_others_only_where_these_are_few(files, monkeypatch):
    asked, submit = [], LocalWorker.submit
    monkeypatch.setattr(
        LocalWorker, "submit", lambda workers, batch, on: asked.append(batch.prompts) or submit(workers, batch, on)
    )
    for most in (3, 10):
        monkeypatch.setattr(q_scale, "_NUM_PROMPTS", most)
        config = settings(files, "pairs", f"of-{most}", method="kto", eval_prompts=0)
        held_out = {row.prompt for row in make_plan(config).held_out.rows}
        train(config)
        for batch in asked:
            prompts = {conversation.messages for conversation in batch}
            assert len(batch) == len(prompts) == most and len(prompts & held_out) == min(most, len(held_out)) > 0
        asked.clear()


def test_a_rule_is_kept_and_the_damage_is_told(files, notes):
    config = settings(
        files, "prompts", method="rule", forbid=tuple("!#$%&()*+=~;?"), max_replies=48, epochs=12, eval_prompts=12,
        max_reply_tokens=12,
    )  # fmt: skip

    result = train(config, reporter=notes)

    change = next(iter(result.evaluation.rewards.values()))
    assert change.gated_mean >= change.base_mean
    assert any("that were fine" in line for line in notes.lines)
    assert result.head.config.scale == 1.0 and result.head.config.min_candidates == 2


def test_a_rule_that_nothing_breaks_teaches_nothing(files):
    with pytest.raises(DataError, match=r"none of .* replies has what is forbidden \('zebra'\)"):
        train(settings(files, "prompts", method="rule", forbid=("zebra",), max_replies=12))


def test_methods_without_q_heads_refuse_them(files):
    with pytest.raises(ConfigError, match="method 'sac' trains heads of the form 'residual' or 'paper'"):
        make_plan(settings(files, "prompts", method="sac", reward="length"))


# --- the pieces


@pytest.fixture(scope="module")
def model():
    return load_model(ModelSpec((tiny_model(), tiny_tokenizer())))


@pytest.mark.parametrize("forbidden", [["a", "b", "c"], ["re:[a-f]|[k-p]{2}", "a*"], ["rule:long?words=1", "e"]])
def test_every_candidate_is_labelled_by_the_text_it_would_make(model, forbidden):
    rule = parse_rule(forbidden)
    head = MARAHead(HeadConfig(form="q", hidden_size=32)).eval()
    prompt = Conversation((Message("user", "hello"),))
    replies = sample_replies(
        model, Decoder(make_backend(model.model)), [prompt], sampling=SamplingParams(max_new_tokens=8, temperature=1.0),
        replies_per_prompt=6, head=head, keep_positions=True,
    )  # fmt: skip

    labelled = label_candidates(model, replies, Positions.of(replies), rule)

    where = labelled.positions
    for row in range(len(where)):
        before = replies[int(where.replies[row])].token_ids[: int(where.places[row])]
        for column in range(where.token_ids.shape[1]):
            text = model.tokenizer.decode([*before, int(where.token_ids[row, column])], skip_special_tokens=True)
            more = len(rule.violations(text)) > len(rule.violations(model.tokenizer.decode(before)))
            assert bool(labelled.offends[row, column]) == (more and bool(where.live[row, column]))
    assert labelled.offends.any() and not labelled.offends.all()


def test_given_replies_have_the_candidates_of_the_model_and_what_is_outside_is_counted(model):
    backend = make_backend(model.model)
    given = [GivenReply(i, Conversation((Message("user", "hello"),)), text) for i, text in enumerate(("abc", "xyzw"))]
    replies = read_replies(model, backend, given, max_tokens=8)
    sampling = SamplingParams(top_k=100, top_p=1.0)

    found = positions_of_given(replies, backend.logits, sampling)

    assert len(found.positions) + len(found.outside) + found.num_lone == 7 == found.positions.num_tokens
    for row in range(len(found.positions)):
        reply = replies[int(found.positions.replies[row])]
        place = int(found.positions.places[row])
        taken = found.positions.token_ids[row, found.positions.taken[row]]
        assert int(taken) == reply.token_ids[place]
        logits = backend.logits(reply.states[place].float()[None])[0]
        assert int(taken) in logits.topk(100).indices
    few = positions_of_given(replies, backend.logits, SamplingParams(top_k=2))
    assert len(few.outside) > len(found.outside)


def test_examples_are_whole_pairs():
    counts = [3, 1, 2, 4]
    owners = torch.arange(4).repeat_interleave(torch.tensor(counts))
    n = len(owners)
    where = Positions(
        torch.arange(n)[:, None].half(), torch.zeros(n, 2).long(), torch.zeros(n, 2), torch.zeros(n).long(), owners,
        torch.zeros(n).long(), n,
    )  # fmt: skip
    pairs = LabelledPositions(torch.tensor([True, False] * 2), 2, where, lambda ids: torch.zeros(len(ids), 1))

    taken = pairs.take(torch.tensor([1, 0]))

    assert len(pairs) == 2 and taken.good.tolist() == [True, False] * 2
    assert taken.positions.states[:, 0].tolist() == [4, 5, 6, 7, 8, 9, 0, 1, 2, 3]
    assert taken.positions.replies.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2, 3]
