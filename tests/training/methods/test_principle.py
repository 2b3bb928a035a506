"""A head from a sentence, from end to end on a tiny model."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch

from mara_integrations.errors import ConfigError, DataError
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Conversation, Message
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.progress import Reporter
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.dry_run import dry_run
from mara_integrations.training.identity import Identity
from mara_integrations.training.learning.q_objectives import centred
from mara_integrations.training.long_prompts import without_long_prompts
from mara_integrations.training.methods import principle
from mara_integrations.training.methods.beside_prompts import exchanged, with_prompts
from mara_integrations.training.methods.principle import PrincipleLearner
from mara_integrations.training.plan import make_plan
from mara_integrations.training.records.store import cache_file
from mara_integrations.training.registry import METHODS
from mara_integrations.training.run import start, train

SMALL = {"max_reply_tokens": 6, "epochs": 2, "inner_size": 16, "eval_prompts": 2, "max_replies": 16}


@pytest.fixture
def files(tmp_path, folder_model):
    rows = [{"prompt": f"{i} {chr(97 + i % 26)}?"} for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def config(files, name="head", **settings):
    named = {"model": str(files / "tiny"), "data": files / "prompts.jsonl", "principle": "Be kind."}
    return TrainConfig.of(**{**named, "output": files / name, **SMALL, **settings})


def weights(files, name):
    return (files / name / "head.safetensors").read_bytes()


def length(completions, **_):
    return [float(len(text)) for text in completions]


def test_an_interrupted_run_ends_with_the_head_of_an_uninterrupted_one(files, interrupting):
    whole = train(config(files, "whole"), judge=length)
    with pytest.raises(KeyboardInterrupt):
        cutting = interrupting("base replies under a neutral sentence", 1)
        train(config(files, "cut"), judge=length, reporter=cutting)

    cut = train(config(files, "cut"), judge=length)

    assert weights(files, "cut") == weights(files, "whole")
    assert cut.head.config.scale == whole.head.config.scale
    assert cut.kl_per_token == whole.kl_per_token <= METHODS["principle"].kl_budget + 1e-6
    metrics = whole.head.config.metrics
    assert metrics["contrast"] == "a neutral sentence"
    rows = metrics["prompt_baseline"]["rows"]
    assert [row["replies"] for row in rows[:4]] == [
        "base model",
        "sentence as system prompt",
        "head",
        "head and sentence",
    ]
    assert [row["decoding"] for row in rows] == ["sampled"] * 4 + ["greedy"] * 4
    assert all(row["perplexity_ratio"] == row["distinct_2_ratio"] == 1.0 for row in rows[::4])
    assert all("length" in row["judges"] for row in rows)
    loaded = MARAHead.from_pretrained(files / "whole")
    assert loaded.config.principle == "Be kind." and loaded.config.form == "q"
    card = (files / "whole" / "README.md").read_text()
    assert "> Be kind." in card and "| head and sentence, greedy |" in card


@pytest.mark.parametrize("cache", ["other replies", "none"])
def test_an_interrupted_run_goes_on_with_its_replies_whatever_the_cache_has(files, interrupting, cache):
    with pytest.raises(KeyboardInterrupt):
        train(config(files, "cut", eval_prompts=0), reporter=interrupting("base replies under a neutral sentence", 1))
    to_fit_on, held_out = cache_file("").parent.glob("*.pt")
    contents = to_fit_on.read_bytes(), held_out.read_bytes()
    for file, other in zip((to_fit_on, held_out), reversed(contents), strict=True):
        file.unlink()
        if cache == "other replies":
            file.write_bytes(other)
    cut = train(config(files, "cut", eval_prompts=0))
    shutil.rmtree(cache_file("").parent)

    whole = train(config(files, "whole", eval_prompts=0))

    assert weights(files, "cut") == weights(files, "whole")
    assert cut.head.config.scale == whole.head.config.scale


def test_the_sentence_decides_the_head(files):
    one, other = (
        train(config(files, name, principle=(), eval_prompts=0), principle=sentence)
        for name, sentence in (("one", "Be kind."), ("other", "Write 0123456789 and nothing else."))
    )

    assert one.head.config.principle == "Be kind."
    assert not all(map(torch.equal, one.head.state_dict().values(), other.head.state_dict().values()))


def test_weights_decide_how_much_of_each_sentence_the_head_learns(files):
    kind, digits = "Be kind.", "Write 0123456789."
    heads = {
        name: train(config(files, name, principle=(), eval_prompts=0), principle=sentences).head
        for name, sentences in {
            "kind": kind,
            "weighted": (kind, 2.0),
            "equal": [(kind, 1.0), (digits, 1.0)],
            "mostly-digits": [(kind, 1.0), (digits, 8.0)],
        }.items()
    }
    states = {name: head.state_dict().values() for name, head in heads.items()}

    assert all(map(torch.equal, states["kind"], states["weighted"])), "the KL budget says how much of one"
    assert not all(map(torch.equal, states["equal"], states["mostly-digits"]))
    assert not all(map(torch.equal, states["kind"], states["equal"]))
    assert heads["mostly-digits"].config.principle == f"1 × {kind}\n8 × {digits}"


@pytest.mark.parametrize(
    ("settings", "contrast", "against"),
    [
        ({}, "a neutral sentence", None),
        ({"against": "Be rude."}, "a neutral sentence and the opposite", "Be rude."),
        ({"against": "Be rude.", "contrast": "neutral"}, "a neutral sentence", None),
        ({"contrast": "opposite"}, "the opposite", "In everything you say, do the exact opposite of this:\nBe kind."),
    ],
)
def test_an_opposite_that_is_given_is_read_beside_the_neutral_sentence(files, settings, contrast, against):
    head = train(config(files, eval_prompts=0, **settings)).head

    assert (head.config.metrics["contrast"], head.config.against) == (contrast, against)


def test_each_contrast_teaches_another_head(files):
    heads = [
        train(config(files, name, eval_prompts=0, against="Write 0123456789.", contrast=name)).head.state_dict()
        for name in ("neutral", "opposite", "both")
    ]

    for one, other in itertools.combinations(heads, 2):
        assert not all(map(torch.equal, one.values(), other.values()))


@pytest.fixture
def alike(monkeypatch):
    """Replies of heads to held-out prompts count as too much alike."""
    monkeypatch.setattr(principle, "quality_ratios", lambda base, gated: (1.0, 0.89))


@pytest.mark.usefixtures("alike")
def test_replies_that_are_too_much_alike_are_a_reason_to_learn_what_prompts_change(files, notes):
    plain = train(config(files, "plain", eval_prompts=0, kl_budget=0.3)).head
    found = train(config(files, eval_prompts=0), reporter=notes).head

    assert found.config.metrics["contrast"] == "a neutral sentence, and what prompts themselves change"
    assert (
        "against a neutral sentence, and what prompts themselves change" in (files / "head" / "README.md").read_text()
    )
    assert [line for line in notes.lines if "too much alike (distinct pairs of tokens x 0.89)" in line]
    assert not all(map(torch.equal, found.state_dict().values(), plain.state_dict().values()))


def test_other_heads_do_not_learn_it(files, monkeypatch):
    monkeypatch.setattr(principle, "quality_ratios", lambda *_: (3.0, 0.901))  # the scale is for perplexity
    found = train(config(files, eval_prompts=0))

    assert found.head.config.metrics["contrast"] == "a neutral sentence"


@pytest.mark.usefixtures("alike")
def test_a_budget_that_the_user_names_is_kept_to_instead(files):
    found = train(config(files, eval_prompts=0, kl_budget=0.3))

    assert found.head.config.metrics["contrast"] == "a neutral sentence"


@pytest.mark.usefixtures("alike")
def test_rounds_and_rewards_go_with_what_prompts_change(files):
    found = train(config(files, eval_prompts=0, rounds=1, partial_text=True), reward=length)

    assert found.head.config.metrics["contrast"] == (
        "a neutral sentence, and what raises length, and what prompts themselves change"
    )


@pytest.mark.usefixtures("alike")
@pytest.mark.parametrize("stage", ["base replies after another prompt", "held-out gated replies 1, again"])
def test_a_run_that_is_interrupted_in_the_second_fit_ends_with_the_same_head(files, interrupting, stage):
    settings = {"eval_prompts": 0, "rounds": 1}
    whole = train(config(files, "whole", **settings))
    with pytest.raises(KeyboardInterrupt):
        train(config(files, "cut", **settings), reporter=interrupting(stage, 1))

    cut = train(config(files, "cut", **settings))

    assert weights(files, "cut") == weights(files, "whole")
    assert cut.head.config.scale == whole.head.config.scale


def test_what_their_own_prompts_change_is_added_in_standard_deviations(files):
    chosen = config(files)
    plan = make_plan(chosen)
    run = start(chosen, plan, Identity.of(chosen, plan), Reporter())
    side = PrincipleLearner.prompt_sides(run)[1]
    replies = PrincipleLearner(run, run.new_head().eval()).gather("replies", side, run.new_head().eval(), is_base=True)
    where, live = replies.positions, replies.positions.live

    (found,) = with_prompts(run, [replies], [torch.ones_like(where.log_probs)])

    def logits(prompt, reply):
        """Return the logits of the whole vocabulary before each token of a reply, by one forward over both."""
        context = run.model.tokenizer(f"[user] {prompt.messages[-1].content}\n[assistant] ").input_ids
        with torch.inference_mode():
            return run.model.model(torch.tensor([[*context, *reply.token_ids]])).logits[0, len(context) - 1 : -1]

    changes = torch.zeros_like(where.log_probs)
    for row, (index, place) in enumerate(zip(where.replies.tolist(), where.places.tolist(), strict=True)):
        reply = replies.generated[index]
        own, other = (replies.prompts[(reply.prompt_index + step) % len(replies.prompts)] for step in (0, 1))
        changes[row] = (logits(own, reply) - logits(other, reply))[place, where.token_ids[row]]
    changes = centred(changes, where.log_probs)
    assert torch.allclose(found[live], 1.0 + 0.5 * (changes / changes[live].std())[live], atol=1e-3)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_no_prompt_is_exchanged_for_itself(count):
    prompts = [Conversation((Message("user", f"{i % count}?"),)) for i in range(2 * count)]  # rounds ask prompts again

    others = exchanged(prompts)

    assert len(others) == len(prompts)
    assert all(one != other for one, other in zip(prompts, others, strict=True))
    assert exchanged([prompts[0], prompts[0], prompts[1]]) == [prompts[1], prompts[1], prompts[0]]


ROOM = 512 - SMALL["max_reply_tokens"]  # tokens of the tiny model's context window, which are characters


def add_prompt(files, num_tokens):
    """Add a prompt that has so many tokens with the template and the sentence before it."""
    around = len("[system] Be kind.\n[user] \n[assistant] ")
    with (files / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "x" * (num_tokens - around)}) + "\n")


def test_a_prompt_that_leaves_no_room_with_the_sentence_before_it_is_named(files):
    settings = config(files, against="Be rude.")
    neutral = len("You are a helpful assistant.") - len("Be kind.")  # is read, too, and is the longest
    add_prompt(files, ROOM - neutral)
    plan, model = make_plan(settings), load_model(ModelSpec(str(files / "tiny")))
    assert without_long_prompts(settings, plan, model) == (plan, None)

    add_prompt(files, ROOM - neutral + 1)
    with pytest.raises(DataError, match=r"prompts.jsonl:22: .*\(1 prompt, with the sentence before it, leaves no room"):
        without_long_prompts(settings, make_plan(settings), model)

    add_prompt(files, ROOM)
    with pytest.raises(DataError, match=r"\(2 prompts, with the sentence before them, leave no room"):
        without_long_prompts(settings, make_plan(settings), model)


def test_a_dry_run_writes_nothing(files):
    estimate = dry_run(config(files))

    assert estimate.replies > 16 and not (files / "head").exists()


def test_without_data_the_shipped_prompts_are_used(files):
    plan = make_plan(config(files, data=None))

    assert (plan.method.name, len(plan.train) + len(plan.held_out)) == ("principle", 320)
    assert plan.why == "a sentence says how replies should be, and the model reads its own under it"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"principle": [" "]}, "a sentence is needed"),
        ({"against": ""}, "a sentence is needed"),
        ({"principle": (), "against": "Be unkind."}, "no principle"),
        ({"forbid": ["no"]}, "either a principle or forbidden words"),
        ({"method": "rloo"}, "method 'rloo' needs a reward"),
        ({"form": "residual"}, "form='residual' is not allowed"),
        ({"principle": (), "data": None}, "there is no data"),
        ({"principle": (), "method": "principle"}, "do not say what a good reply is"),
        ({"principle_file": "nowhere.txt"}, "can't be read"),
        ({"principle": ["Be kind.=none"]}, "weight 'none' is not allowed"),
        ({"principle": ["Be kind.=2"], "contrast": "opposite"}, "contrast='opposite' is not allowed beside"),
    ],
)
def test_what_can_not_work_is_refused_before_the_model_is_loaded(files, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(config(files, **settings))
