"""Rounds of the methods that fit a head to a contrast: the head's own replies are read, and a round has to help."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from mara_integrations.progress import Reporter
from mara_integrations.testing import tiny_model, tiny_tokenizer
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import limited_prompts
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.identity import Identity
from mara_integrations.training.methods import contrast
from mara_integrations.training.methods.contrast import ContrastLearner, gain_in_deviations
from mara_integrations.training.methods.grounding import GroundingLearner
from mara_integrations.training.methods.principle import differences
from mara_integrations.training.methods.readings import Side
from mara_integrations.training.methods.rounds import PromptSide
from mara_integrations.training.plan import make_plan
from mara_integrations.training.run import start, train
from mara_integrations.training.scoring import q_scale
from mara_integrations.training.scoring.scale import set_scale

SMALL = {"max_reply_tokens": 6, "epochs": 2, "inner_size": 16, "eval_prompts": 0, "max_replies": 16, "rounds": 1}
LEARNING = {"max_replies": 68, "max_reply_tokens": 10, "epochs": 10, "inner_size": 64, "kl_budget": 1.0}
VOWELS = "tests/reward_for_tests.py:vowels"
METHODS = {
    "principle": {"principle": "Be kind."},
    "principle beside a reward": {"principle": "Be kind.", "reward": VOWELS, "partial_text": True},
    "teacher": {"teacher": "tuned"},
    "grounding": {"method": "grounding"},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Models and prompts, which no test changes."""
    folder = tmp_path_factory.mktemp("saved")
    for name, seed in (("tiny", 0), ("tuned", 1)):
        tiny_model(seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": f"{i} {chr(97 + i % 26)}?"} for i in range(80)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [row | {"context": f"The word of {i % 4} is {chr(97 + i % 4) * 3}."} for i, row in enumerate(rows)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return folder


@pytest.fixture
def config(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)

    def config(name="head", how="principle", **settings):
        data = tmp_path / ("asked.jsonl" if how == "grounding" else "prompts.jsonl")
        named = {"model": str(tmp_path / "tiny"), "data": data, **METHODS[how], **settings}
        if "teacher" in named:
            named["teacher"] = str(tmp_path / named["teacher"])
        return TrainConfig.of(**{"output": tmp_path / name, **SMALL, **named})

    return config


def compared(config):
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "held-out comparison"]


def test_few_prompts_are_held_out_with_as_many_replies_each_as_are_learned_from(config, tmp_path, monkeypatch):
    rows = [{"prompt": f"{letter}?"} for letter in "abcdefgh"]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = {}

    def counting(run, stage, prompts, *arguments, **settings):
        replies = generate_replies(run, stage, prompts, *arguments, **settings)
        counts[stage] = len(replies) / len(prompts)
        return replies

    monkeypatch.setattr(contrast, "generate_replies", counting)
    train(config(data=tmp_path / "few.jsonl", rounds=0))

    assert counts["base replies"] == counts["held-out base replies"] == counts["held-out gated replies 1"] > 1


@pytest.mark.parametrize("how", METHODS)
def test_a_round_fits_what_the_head_wrote_beside_what_the_base_model_wrote(config, how, monkeypatch):
    fitted, learner = {}, GroundingLearner if how == "grounding" else ContrastLearner
    fit_to = learner.fit_to

    def counting(self, name, train, held_out):
        fitted[name] = [int(side.positions.replies.max()) + 1 for side in (train, held_out)]
        return fit_to(self, name, train, held_out)

    monkeypatch.setattr(learner, "fit_to", counting)
    train(config(how=how))

    (base, held_out_base), (both, held_out_both) = fitted["fit 1"], fitted["fit 2"]
    assert both == base + 2 * (base // 4), "sampled and greedy replies to a quarter of the prompts"
    assert held_out_both == 2 * held_out_base


@pytest.mark.parametrize(
    ("how", "moment"),
    [
        ("principle", "sampled gated replies 1"),
        ("principle", "greedy gated replies 1 under a neutral sentence"),
        ("principle beside a reward", "fit 2"),
        ("teacher", "held-out gated replies 1 by the teacher"),
    ],
)
def test_a_run_that_is_interrupted_in_a_round_ends_with_the_head_of_an_uninterrupted_one(
    config, how, moment, interrupting
):
    whole = train(config("whole", how))
    with pytest.raises(KeyboardInterrupt):
        train(config("cut", how), reporter=interrupting(moment, 1))

    cut = train(config("cut", how))

    assert cut.head.fingerprint == whole.head.fingerprint
    assert cut.head.config.scale == whole.head.config.scale
    assert cut.kl_per_token == whole.kl_per_token <= 0.3 + 1e-6


LEARNS_NOTHING = {"learning_rate": 1.0, "epochs": 1, "rounds": 0}  # one step, far beyond any minimum


@pytest.mark.parametrize(
    ("how", "helps"),
    [
        ("principle", "More replies (--max-replies) would help, or a plainer sentence, or the opposite of it"),
        ("teacher", "More replies (--max-replies) would help.[/]"),
        ("grounding", "More replies (--max-replies) would help.[/]"),
    ],
)
def test_a_head_that_learned_nothing_is_told_with_what_would_help(config, how, helps, notes):
    train(config(how=how, **LEARNS_NOTHING), reporter=notes)

    (said,) = [line for line in notes.lines if "learned nothing" in line]

    assert helps in said


def test_of_a_head_that_learned_something_no_such_thing_is_said(config, notes):
    train(config(**LEARNING), reporter=notes)

    assert not [line for line in notes.lines if "learned nothing" in line]


def spoiled(monkeypatch, number):
    """Spoil the fit of this number, the first being 1; return the list of the heads that fits end with."""
    heads, fit = [], ContrastLearner.fit

    def spoiling(learner, name, rounds, held_out_rounds):
        fit(learner, name, rounds, held_out_rounds)
        if len(heads) + 1 == number:
            learner.head.load_state_dict(learner.run.new_head().state_dict())  # which is the base model
        heads.append(learner.head.fingerprint)

    monkeypatch.setattr(ContrastLearner, "fit", spoiling)
    return heads


@pytest.mark.parametrize("how", METHODS)
def test_rounds_end_where_one_did_not_help_and_the_head_is_as_before(config, how, monkeypatch):
    heads = spoiled(monkeypatch, 2)

    result = train(config(how=how, **{**LEARNING, "rounds": 5}))

    assert len(heads) == 2, "of six"
    assert result.head.fingerprint == heads[0]


@pytest.mark.parametrize("how", METHODS)
def test_a_round_that_helps_is_kept(config, how, monkeypatch):
    heads = spoiled(monkeypatch, 1)

    result = train(config(how=how, **LEARNING))

    assert result.head.fingerprint == heads[1] != heads[0]


def test_a_round_is_reported_by_what_contrast_rewards_and_judges_say(config):
    settings = config(how="principle beside a reward", judge="tests/reward_for_tests.py:brevity")
    train(settings)

    lines = compared(settings)

    assert [line["stage"] for line in lines] == ["round 1", "round 2"]
    assert [list(line["rewards"]) for line in lines] == [["contrast", "vowels", "brevity"]] * 2
    assert all(line["kl_per_token"] > 0.0 for line in lines)


def test_without_rounds_nothing_of_the_head_is_read(config, monkeypatch):
    read = []

    def reading(run, sides):
        read.extend(name for side in sides for name in side.parts)
        return differences(run, sides)

    monkeypatch.setattr("mara_integrations.training.methods.principle.differences", reading)
    train(config(rounds=0))

    assert read == ["base replies", "held-out base replies"]


def test_the_contrast_of_a_reply_is_how_much_more_probable_the_sentence_makes_it(config):
    chosen = config(principle="Be kind.", against="Be rude.")
    plan = make_plan(chosen)
    run = start(chosen, plan, Identity.of(chosen, plan), Reporter())
    untrained = run.new_head().eval()
    prompts = [limited_prompts(run, side) for side in (plan.train, plan.held_out)]
    sides = [
        Side.of(f"part {i}", each, generate_replies(run, f"part {i}", each, 1, 0, untrained, is_base=True))
        for i, each in enumerate(prompts)
    ]

    opinion = differences(run, [Side.join(sides)])[0].opinions["contrast"]

    def log_prob(sentence, prompt, token_ids):
        """By a forward over the whole text."""
        text = f"[system] {sentence}\n[user] {prompt.messages[-1].content}\n[assistant] "
        context = run.model.tokenizer(text).input_ids
        with torch.inference_mode():
            logits = run.model.model(torch.tensor([[*context, *token_ids]])).logits[0, len(context) - 1 : -1]
        return float(logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None]).mean())

    expected = []
    for side in sides:
        for reply in side.generated:
            prompt = side.prompts[reply.prompt_index]
            kind, neutral, rude = (
                log_prob(sentence, prompt, reply.token_ids)
                for sentence in ("Be kind.", "You are a helpful assistant.", "Be rude.")
            )
            expected.append(kind - (neutral + rude) / 2)
    assert opinion.scores == pytest.approx(expected, abs=1e-4)
    assert opinion.weight == 1.0 and max(map(abs, expected)) > 1e-3


@pytest.fixture
def measured(config):
    """Measures a head of random weights, at a multiple of the scale within the KL budget on its own replies."""

    def measured(factor, **settings):
        chosen = config(**settings)
        plan = make_plan(chosen)
        run = start(chosen, plan, Identity.of(chosen, plan), Reporter())
        torch.manual_seed(0)
        learner = ContrastLearner(run, run.new_head().eval(), differences)
        prompts = PromptSide(plan.held_out, limited_prompts(run, plan.held_out), 1, 0)
        base = learner.gather("base", prompts, learner.head, is_base=True)
        with torch.no_grad():
            for tensor in learner.head.parameters():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
        gated = learner.gather("gated", prompts, learner.head)
        set_scale(learner.head, factor * learner.scale_within_budget(gated))
        return learner.gain("round 1", prompts, base, gated)

    return measured


def test_a_gain_counts_at_the_scale_within_the_budget_on_the_head_s_own_replies(measured):
    half, whole, double, fourfold = (measured(factor, kl_budget=0.15) for factor in (0.5, 1.0, 2.0, 4.0))

    assert half == whole == pytest.approx(2 * double) == pytest.approx(4 * fourfold) != 0.0


def test_a_gain_counts_at_the_scale_at_which_replies_keep_perplexity_and_variety(measured, monkeypatch):
    monkeypatch.setattr(q_scale, "quality_losses", lambda *_: (0.0, 0.0))
    kept = measured(0.5)
    monkeypatch.setattr(q_scale, "quality_losses", lambda *_: (2.0, 0.0))

    assert 0.0 < measured(0.5) / kept < 1.0
    assert measured(0.5, kl_budget=0.15) == kept, "a budget that is named is all that bounds"


@pytest.mark.parametrize(
    ("base", "gated", "gain"),
    [
        ([1.0, 3.0], [2.0, 4.0], 1.0),
        ([10.0, 30.0], [20.0, 40.0], 1.0),
        ([1.0, None, 3.0], [2.0, 9.0, 4.0], 1.0),
        ([1.0, 1.0], [3.0, 3.0], 2.0),
        ([None], [1.0], 0.0),
    ],
    ids=["a deviation", "in any unit", "without what has no score", "all base replies alike", "no scores"],
)
def test_a_gain_counts_in_standard_deviations_of_base_replies(base, gated, gain):
    assert gain_in_deviations(base, gated) == pytest.approx(gain)


def test_the_plan_says_how_many_rounds_there_are(config):
    assert make_plan(config()).why.endswith("; replies of the head are read in one more round")
    assert make_plan(config(rounds=3)).why.endswith("; replies of the head are read in up to 3 more rounds")
    assert "round" not in make_plan(config(rounds=0)).why
