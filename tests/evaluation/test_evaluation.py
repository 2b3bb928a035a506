"""Base against gate on a tiny model: pairing, random numbers, marks, counts, and reports that show text as text."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import warnings

import pytest
from rich.console import Console

from mara_integrations.data import PromptRow, read_prompts
from mara_integrations.engine.gate import accept_logit
from mara_integrations.engine.generation import TracePosition
from mara_integrations.errors import ConfigError, DataError, OutputError, RewardError
from mara_integrations.evaluation.console import gated_text, print_examples, print_summary
from mara_integrations.evaluation.evaluate import evaluate
from mara_integrations.evaluation.marks import Mark, Rejected, hazard_logits, rejected_candidates
from mara_integrations.evaluation.metrics import wilson
from mara_integrations.evaluation.report import (
    check_report_path,
    render_html,
    summary_rows,
    write_report,
)
from mara_integrations.evaluation.text import visible
from mara_integrations.messages import Message
from mara_integrations.runtime import MARAEngine
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer

PROMPTS = ["hello", "what is up?", "a"]


@pytest.fixture(scope="module")
def loaded():
    return tiny_model(), tiny_tokenizer()


@pytest.fixture(scope="module")
def engines(loaded):
    return {form: MARAEngine(loaded, random_head(32, form, accept_rate=0.4)) for form in ("paper", "residual", "value")}


@pytest.fixture(scope="module")
def sampled(engines):
    return run(engines["residual"], {"even": even, "length": length})


def run(engine, rewards=None, prompts=PROMPTS, **settings):
    return evaluate(engine, prompts, rewards, **{"temperature": 0.9, "max_new_tokens": 9, "batch_size": 2, **settings})


def even(completions, **_):
    return [float(len(text) % 2 == 0) for text in completions]


def length(completion_ids, **_):
    return [float(sum(ids)) for ids in completion_ids]


def test_an_evaluation_but_for_speed_is_the_same_for_the_same_seed(engines, sampled):
    again = run(engines["residual"], {"even": even, "length": length})
    assert again.rewards == sampled.rewards
    assert again.gated.perplexity == pytest.approx(sampled.gated.perplexity, rel=1e-5)  # the order of sums may differ
    for mine, theirs in zip(again.examples, sampled.examples, strict=True):
        assert (mine.base.token_ids, mine.gated.token_ids) == (theirs.base.token_ids, theirs.gated.token_ids)
        assert [mark.outcome for mark in mine.marks] == [mark.outcome for mark in theirs.marks]
    other = run(engines["residual"], {"even": even, "length": length}, seed=7)
    assert other.examples[0].base.token_ids != sampled.examples[0].base.token_ids


@pytest.mark.parametrize("form", ["paper", "residual", "value"])
def test_both_sides_are_what_the_engine_gives_one_by_one_with_the_prompts_own_seed(engines, form):
    engine = engines[form]
    for index, example in enumerate(run(engine, seed=3).examples):
        settings = {"temperature": 0.9, "max_new_tokens": 9, "seed": 3 + index}
        prompt = [Message("user", PROMPTS[index])]
        assert example.seed == settings["seed"]
        assert example.base.token_ids == engine.generate(prompt, head=None, **settings).token_ids
        assert example.gated.token_ids == engine.generate(prompt, **settings).token_ids


@pytest.mark.parametrize("form", ["paper", "residual", "value"])
def test_at_strength_zero_both_sides_are_equal(engines, form):
    evaluation = run(engines[form], length, strength=0.0)
    for example in evaluation.examples:
        assert example.base == example.gated
        assert {mark.outcome for mark in example.marks} <= {"base", "single"}
    comparison = evaluation.rewards["length"]
    assert (comparison.wins, comparison.ties, comparison.losses) == (0, 3, 0)
    assert evaluation.perplexity_ratio.mean == 1.0
    assert evaluation.gate.rejected == 0


@pytest.mark.parametrize("form", ["residual", "value"])
def test_an_untrained_head_is_the_base_model_under_common_random_numbers(loaded, form):
    head = random_head(32, form)
    for parameter in head.output_linear.parameters():
        parameter.zero_()
    evaluation = run(MARAEngine(loaded, head))
    assert [e.gated.token_ids for e in evaluation.examples] == [e.base.token_ids for e in evaluation.examples]
    rejected = [item for e in evaluation.examples for mark in e.marks for item in mark.rejected]
    assert rejected, "drawing a token passes others over"
    assert not any(item.is_by_head for item in rejected), "but that is not the head's doing"
    assert all(item.push == pytest.approx(0.0, abs=1e-3) for item in rejected)


def test_the_base_side_draws_from_the_candidates_that_the_head_was_trained_with(loaded):
    head = random_head(32, "residual", top_k=3, top_p=1.0, min_candidates=2)
    evaluation = run(MARAEngine(loaded, head))
    want = MARAEngine(loaded).generate(
        [Message("user", PROMPTS[0])], temperature=0.9, max_new_tokens=9, seed=0, top_k=3, top_p=1.0
    )
    assert evaluation.examples[0].base.token_ids == want.token_ids
    assert (evaluation.sampling.top_k, evaluation.sampling.min_candidates) == (3, 2)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("form", ["paper", "residual"])
def test_marks_spell_the_reply_and_agree_with_the_counts(engines, form, temperature):
    evaluation = run(engines[form], temperature=temperature)
    marks = [mark for example in evaluation.examples for mark in example.marks]
    for example in evaluation.examples:
        assert "".join(mark.text for mark in example.marks) == example.gated.text
        assert tuple(mark.log_prob for mark in example.marks) == example.gated.log_probs
    gate, outcomes = evaluation.gate, [mark.outcome for mark in marks]
    assert [outcomes.count(o) for o in ("accepted", "forced", "fallback")] == [
        gate.accepted,
        gate.forced,
        gate.fallbacks,
    ]
    rejected = sum(len(mark.rejected) for mark in marks)
    looks_ahead = form == "residual" and temperature == 0
    fallbacks = gate.fallbacks  # the one taken was rejected too
    assert 0 < rejected < gate.rejected if looks_ahead else rejected == gate.rejected - fallbacks > 0
    assert all(item.is_by_head for mark in marks for item in mark.rejected) or temperature > 0


def test_a_stop_string_is_in_no_mark(engines):
    text = run(engines["residual"], temperature=0.0).examples[0].gated.text
    stop = text[4:6]
    example = run(engines["residual"], temperature=0.0, stop=stop).examples[0]
    assert example.gated.finish_reason == "stop"
    assert example.gated.text == text[: text.index(stop)]
    assert "".join(mark.text for mark in example.marks) == example.gated.text


def test_the_push_is_what_the_head_added_to_the_hazard():
    log_probs = (-0.5, -1.5, -2.0)
    for temperature in (1.0, 0.6):
        weights = [math.exp(value / temperature) for value in log_probs]
        hazards = [weights[k] / sum(weights[k:]) for k in range(2)]
        want = [pytest.approx(accept_logit("residual", 0.0, math.log(h / (1 - h)), 1.0)) for h in hazards]
        assert hazard_logits(log_probs, temperature) == [*want, 30.0]


def test_where_all_were_rejected_all_but_the_one_taken_are_marked():
    position = TracePosition((5, 6, 7), (-1.0, -2.0, -3.0), (-1.0, -0.5, -2.0), 1, "fallback")
    assert rejected_candidates(position) == [0, 2]
    assert rejected_candidates(dataclasses.replace(position, outcome="accepted", accept_logits=(-1.0, 0.5, -2.0))) == [
        0
    ]
    assert rejected_candidates(dataclasses.replace(position, outcome="single", accept_logits=(), taken=0)) == []


def test_rewards_compare_pairs_and_only_yes_or_no_has_a_compliance(sampled):
    for name, comparison in sampled.rewards.items():
        base = [example.base.scores[name] for example in sampled.examples]
        gated = [example.gated.scores[name] for example in sampled.examples]
        assert (comparison.num_pairs, comparison.num_dropped) == (3, 0)
        assert comparison.difference.mean == pytest.approx(sum(gated) / 3 - sum(base) / 3)
        assert comparison.preference.mean == pytest.approx((comparison.wins - comparison.losses) / 3)
    example = sampled.examples[0]
    assert example.gated.scores["length"] == sum(example.gated.token_ids)
    yes = sum(example.gated.scores["even"] for example in sampled.examples)
    assert sampled.rewards["even"].gated_compliance == wilson(int(yes), 3)
    assert sampled.rewards["length"].gated_compliance is None


def test_rewards_get_the_columns_of_their_prompts_and_one_reward_goes_by_its_own_name(engines):
    seen = []

    def brand(prompts, completions, product):
        seen.extend(zip(prompts, product, strict=True))
        return [None if name == "x" else 1.0 for name in product]

    rows = [PromptRow((Message("user", name),), {"product": name}, f"data:{name}") for name in "xyz"]
    evaluation = run(engines["paper"], brand, rows)
    assert set(seen) == {(name, name) for name in "xyz"}
    assert [example.source for example in evaluation.examples] == ["data:x", "data:y", "data:z"]
    comparison = evaluation.rewards["brand"]
    assert (comparison.num_pairs, comparison.num_dropped) == (2, 1)


def test_conversations_reach_a_reward_as_messages(engines, tmp_path):
    def turns(prompts, completions):
        return [float(len(prompt)) + len(reply) for prompt, reply in zip(prompts, completions, strict=True)]

    messages = [{"role": "user", "content": "hi"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": messages}) + "\n")
    assert run(engines["paper"], turns, read_prompts(path)).examples[0].gated.scores == {"turns": 2.0}


def test_a_reward_without_any_opinion_is_reported_as_that(engines):
    evaluation = run(engines["paper"], {"mute": lambda completions: [None] * len(completions)})
    assert evaluation.rewards["mute"].num_dropped == 3
    assert "no opinion on any of 3 prompts" in summary_rows(evaluation)[0].change
    json.loads(evaluation.to_json())


def test_progress_counts_replies_of_both_sides(engines):
    heard = []
    run(engines["paper"], on_progress=heard.append)
    assert heard == [1] * 6, "three prompts, each reply as it is done"


def test_costs_are_counted_in_forwards(nothing_fed_ahead):
    evaluation = run(MARAEngine((tiny_model(), tiny_tokenizer()), random_head(32, "residual")))
    base, gated, gate = evaluation.base, evaluation.gated, evaluation.gate
    assert base.forwards_per_token == 1 - len(PROMPTS) / base.num_tokens, "the last token of a reply is never fed"
    assert gated.forwards_per_token == gate.fed / gated.num_tokens
    unseen = sum(example.marks[-1].outcome == "single" for example in evaluation.examples)  # last, and not judged
    assert gate.fed == gated.num_tokens + gate.rejected - unseen
    assert evaluation.extra_forwards == pytest.approx(gated.forwards_per_token - base.forwards_per_token)
    assert evaluation.speed_ratio == gated.tokens_per_s / base.tokens_per_s > 0


@pytest.mark.parametrize(
    ("prompts", "settings", "error", "words"),
    [
        ([], {}, DataError, "no prompts"),
        (PROMPTS, {"head": None}, ConfigError, "no head"),
        (PROMPTS, {"temperature": -1.0}, ConfigError, r"^temperature=-1.0"),
        (PROMPTS, {"strenght": 1.0}, ConfigError, "strenght"),
        (PROMPTS, {"batch_size": 0}, ConfigError, "batch_size"),
        (["ok", "x" * 600], {}, ConfigError, r"^prompt 2: the prompt has \d+ tokens"),
    ],
)
def test_bad_input_is_refused_before_anything_is_generated(engines, monkeypatch, prompts, settings, error, words):
    monkeypatch.setattr("mara_integrations.evaluation.evaluate._decode", lambda *_: pytest.fail("generated"))
    with pytest.raises(error, match=words):
        run(engines["paper"], prompts=prompts, **settings)


def test_a_reward_that_raises_is_heard_after_the_first_batch(engines):
    heard = []
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        run(engines["paper"], lambda completions: [1 / 0], on_progress=heard.append, batch_size=1)
    assert heard == [1, 1]


def test_json_holds_everything(sampled):
    whole = json.loads(sampled.to_json())
    assert whole["examples"][0]["prompt"] == [{"role": "user", "content": "hello"}]
    assert whole["gate"]["accepted"] == sampled.gate.accepted
    assert whole["rewards"]["even"]["preference"]["low"] == sampled.rewards["even"].preference.low
    assert whole["examples"][1]["marks"][0]["text"] == sampled.examples[1].marks[0].text
    assert whole["sampling"]["temperature"] == 0.9


NASTY = '<script>alert("x")</script> & [red]markup[/red] \x1b[31m\x07'


@pytest.fixture
def nasty(sampled):
    """An evaluation in which everything that somebody else wrote is hostile."""
    example = sampled.examples[0]
    rejected = tuple(Rejected(f"{NASTY}{i}\n", -1.0, -2.0, -3.0, True) for i in range(5))
    marks = (
        Mark(NASTY, -0.5, 1.0, "accepted", rejected),
        Mark(" b", -0.5, -1.0, "forced", (dataclasses.replace(rejected[0], is_by_head=False),)),
    )
    reply = dataclasses.replace(example.base, text=NASTY, scores={NASTY: 1.0})
    prompt = (Message("system", NASTY), Message("user", NASTY))
    example = dataclasses.replace(example, prompt=prompt, base=reply, gated=reply, marks=marks)
    rewards = {NASTY: sampled.rewards["even"]}
    return dataclasses.replace(sampled, model=NASTY, head=NASTY, rewards=rewards, examples=(example,))


def test_the_page_escapes_everything_and_loads_nothing(nasty):
    page = render_html(nasty)
    assert "<script" not in page and "\x1b" not in page
    assert page.count("&lt;script&gt;") > 10
    assert not re.search(r"<link|\bsrc\s*=|\bhref\s*=\s*.(?!#reply-)|@import|url\(", page)
    assert re.search(r"default-src 'none'", page)
    tags = re.findall(r"<(\w+)", page.split("<body>")[1])
    allowed = {
        "h1",
        "h2",
        "h3",
        "p",
        "div",
        "span",
        "del",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "article",
        "label",
        "input",
        "strong",
        "dl",
        "dt",
        "dd",
        "ol",
        "li",
        "a",
        "br",
    }
    assert set(tags) <= allowed


def test_the_page_strikes_what_was_rejected_before_what_was_taken(nasty):
    page = render_html(nasty).split('<div class="reply">')[2]
    assert page.count("<del tabindex=") == 3, "the rest is counted"
    assert page.index('class="more"') < page.index('class="instead"') < page.index('class="forced"')
    assert "+2</span>" in page
    assert 'class="chance"' in page
    assert "accepted · base probability 0.607 · accept logit +1.00" in page
    assert "accept logit -2.00 · of which the head -3.00" in page


def printed(function, *arguments):
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    function(console, *arguments)
    return console.file.getvalue()


def test_the_console_interprets_no_markup_and_no_control_characters(nasty):
    for text in (printed(print_summary, nasty), printed(print_examples, nasty, 1)):
        assert "[red]markup[/red]" in re.sub(r"\x1b\[[\d;]*m", "", text)
        assert "\x07" not in text and "\u241b" in text


def test_the_console_strikes_what_the_head_rejected_and_marks_what_was_forced(nasty):
    spans = gated_text(nasty.examples[0].marks).spans
    assert [span.style for span in spans] == ["red strike"] * 3 + ["red dim", "green", "yellow underline"]


def test_where_no_style_shows_rejected_tokens_stand_in_brackets(nasty):
    console = Console(file=io.StringIO(), width=100)
    print_examples(console, nasty, 1)
    assert "[-" in console.file.getvalue()
    assert "[-" not in printed(print_examples, nasty, 1)


def test_the_summary_tells_base_gated_and_change(sampled):
    text = printed(print_summary, sampled)
    for word in ("even: complies", "even: preference", "length: mean", "perplexity", "distinct-2", "tokens/s (noisy)"):
        assert word in text
    assert "3 prompts" in text


def test_without_a_reward_the_summary_still_measures_perplexity_and_cost(engines):
    measures = [row.measure for row in summary_rows(run(engines["value"]))]
    assert measures[0].startswith("perplexity")


def test_visible_keeps_text_and_shows_controls():
    assert visible("naïve 🌱\n\t\x00\x1b\x7f\x9b") == "naïve 🌱\n\t\u2400\u241b\u2421\ufffd"


def test_a_report_is_written_in_the_form_of_its_name(sampled, tmp_path):
    write_report(sampled, tmp_path / "new" / "report.html")
    write_report(sampled, tmp_path / "report.JSON")
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert json.loads((tmp_path / "report.JSON").read_text(encoding="utf-8"))["form"] == "residual"


def test_a_report_that_can_not_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(ConfigError, match="no known format"):
        check_report_path(tmp_path / "report.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        check_report_path(tmp_path / "file" / "report.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        check_report_path(tmp_path / "folder.html")


@pytest.mark.slow
def test_the_real_model_is_evaluated_end_to_end():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = MARAEngine("smollm2", random_head(576, "residual"))
        evaluation = run(engine, even, ["Say hello.", "Name a colour."], strength=0.5)
    for example in evaluation.examples:
        assert "".join(mark.text for mark in example.marks) == example.gated.text
    assert evaluation.gate.rejected > 0
    assert 1.0 < evaluation.base.perplexity < 30.0
