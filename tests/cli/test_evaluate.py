"""`mara-tools eval` on a tiny model: rewards, reports, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import VOWELS, refused, run, write_rows

from mara_integrations.testing import random_head

pytestmark = pytest.mark.usefixtures("in_the_folder")

TEMPLATE = "{context_str} | {query_str}"
QUESTIONS = [{"prompt": f"{i}?", "context": f"{i} is {chr(97 + i)}.", "answer": chr(97 + i)} for i in range(12)]


def test_eval_takes_the_heads_own_reward_and_of_its_training_file_only_what_was_held_out(rewarded, folder):
    result = run(
        *("eval", "--model", "model", "--head", "rewarded", "--data", "prompts.jsonl"),
        *("--max-new-tokens", 5, "--report", "report.html", "--examples", 1, "--trust-head-code"),
    )
    assert "Prompts 2 of prompts.jsonl; the head was trained on this file" in result.stdout
    assert f"Rewards {VOWELS} (recorded with the head)" in result.stdout
    assert result.stdout.rstrip().endswith("Report  report.html")
    assert "hello" in Path("report.html").read_text()
    assert result.stderr == ""


def test_eval_with_rewards_of_its_own(folder):
    said = run(
        *("eval", "--model", "model", "--head", "head", "--data", "pairs.jsonl", "--limit", 3, "--examples", 0),
        *("--reward", VOWELS, "--reward", VOWELS, "--forbid", "However", "--max-new-tokens", 4, "--strength", 0),
        *("--report", "report.json"),
    ).stdout
    assert f"{VOWELS}; {VOWELS}; forbidden 'however'" in said
    report = json.loads(Path("report.json").read_text())
    assert len(report["rewards"]) == 3  # also the second of one name
    assert (len(report["examples"]), report["strength"]) == (3, 0.0)
    assert all(example["base"]["text"] == example["gated"]["text"] for example in report["examples"])


@pytest.mark.filterwarnings("default")  # pytest makes them errors
def test_eval_goes_on_without_a_recorded_reward_that_is_gone(folder):
    spec = {"kind": "function", "path": "gone.py:judge"}
    random_head(32, "residual", rewards=(spec,)).save_pretrained("orphan")
    asking = ("eval", "--model", "model", "--head", "orphan", "--data", "prompts.jsonl", "--max-new-tokens", 2)
    result = run(*asking, "--trust-head-code")
    assert result.stderr.startswith("warning: a reward that the head records is left out: reward 'gone.py:judge'")
    assert result.stderr.count("\n") == 1 and "Rewards none\n" in result.stdout


@pytest.mark.filterwarnings("default")  # pytest makes them errors
def test_eval_runs_no_code_that_a_head_names(folder):
    (folder / "evil.py").write_text("import os; os.mkdir('pwned')\ndef f(completions, **_): return [0.0]\n")
    spec = {"kind": "function", "path": "evil.py:f"}
    random_head(32, "residual", rewards=(spec,)).save_pretrained("hostile")
    asking = ("eval", "--model", "model", "--head", "hostile", "--data", "prompts.jsonl", "--max-new-tokens", 2)

    said = run(*asking).stderr

    assert not Path("pwned").exists()
    assert said == (
        "warning: the head records a reward that imports code ('evil.py:f'); it is left out: name it by --reward, or "
        "trust this head with --trust-head-code\n"
    )


@pytest.fixture
def asking(folder):
    """What `eval` is asked about a file of questions, but for the head; the file lies in the folder."""
    write_rows(folder / "questions.jsonl", QUESTIONS)
    quick = ("--max-new-tokens", 2, "--examples", 0, "--report", "asked.json")
    return ("eval", "--model", "model", "--data", "questions.jsonl", *quick)


def asked():
    """The report: the prompts, and the names of the rewards."""
    report = json.loads(Path("asked.json").read_text())
    return [example["prompt"][-1]["content"] for example in report["examples"]], list(report["rewards"])


def test_a_head_for_documents_is_asked_as_it_was_trained(asking):
    quick = ("--max-reply-tokens", 4, "--epochs", 1, "--inner-size", 16, "--max-replies", 12, "--eval-prompts", 0)
    data = ("--data", "questions.jsonl", "--context-template", TEMPLATE, "--held-out", 0.2)
    run("train", "--model", "model", "--output", "grounded", *data, *quick)

    said = run(*asking, "--head", "grounded").stdout
    assert "only those held out then; each question with its own documents and with others\n" in said
    prompts, rewards = asked()
    assert rewards == ["answered", "admitted"] and "Rewards answered; admitted\n" in said
    held_out = [row for row in QUESTIONS if f"{row['context']} | {row['prompt']}" in prompts]
    pairs = [f"{own['context']} | {row['prompt']}" for row in held_out for own in held_out]
    assert len(held_out) == 2 and sorted(prompts) == sorted(pairs), "each with its own and with the other's"

    write_rows(Path("questions.jsonl"), QUESTIONS[:3])  # another file: all of it
    assert "Prompts 6 of questions.jsonl; each question" in run(*asking, "--head", "grounded").stdout
    run(*asking, "--head", "grounded", "--context-template", "Q: {query_str} {context_str}", "--limit", 1)
    assert asked()[0] == ["Q: 0? 0 is a."], "the template that is named goes first"


def test_any_head_is_asked_about_documents_by_a_template(asking):
    run(*asking, "--head", "head", "--reward", "answered", "--context-template", TEMPLATE, "--limit", 2)
    (own, other), rewards = asked()
    assert own == "0 is a. | 0?" != other and other.endswith(" | 0?") and rewards == ["answered"]

    run(*asking, "--head", "head", "--limit", 2)
    assert asked() == (["0?", "1?"], []), "without one, questions are asked as they are"


@pytest.mark.parametrize(
    ("data", "template", "said"),
    [
        ("questions.jsonl", "{context_str}", "context_template='{context_str}' is not allowed"),
        ("prompts.jsonl", TEMPLATE, "'prompts.jsonl' holds no questions with documents"),
    ],
)
def test_eval_refuses_a_template_that_can_not_be_filled(asking, data, template, said):
    assert said in refused(*asking, "--head", "head", "--data", data, "--context-template", template)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head": "absent"}, "'absent'"),
        ({"head": "{bad}/wide"}, "expects hidden size 48; model 'model' has 32"),
        ({"head": "{bad}/corrupt"}, "head.safetensors' is damaged"),
        ({"data": "absent.jsonl"}, "absent.jsonl"),
        ({"reward": "{bad}/raises.py:judge"}, "raised ValueError: first second"),
        ({"reward": "{bad}/short.py:judge"}, "returned a list of length 1 for "),
        ({"report": "report.pdf"}, "report.pdf"),
        ({"report": "prompts.jsonl/report.html"}, "prompts.jsonl"),
        ({"temperature": -1}, "temperature=-1.0 is not allowed"),
    ],
)
def test_eval_refuses_in_one_line_and_writes_no_report(folder, bad, options, said):
    given = {"model": "model", "head": "head", "data": "prompts.jsonl", "report": "{bad}/report.html", **options}
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value).format(bad=bad))]
    assert said in refused("eval", *flags, "--max-new-tokens", 2)
    assert not list(bad.glob("*report*"))


def test_heads_are_compared_on_the_prompts_that_none_of_them_was_fitted_on(rewarded, folder):
    asking = ("eval", "--model", "model", "--head", "rewarded", "--compare", "head", "--compare", "rewarded")
    said = run(
        *(*asking, "--data", "prompts.jsonl", "--max-new-tokens", 5, "--examples", 0, "--report", "heads.json"),
        *("--reward", VOWELS),
    ).stdout
    assert "Prompts 2 of prompts.jsonl; the head was trained on this file" in said
    assert "head (other) against rewarded (first)" in said
    other, same = json.loads(Path("heads.json").read_text())["comparisons"]
    assert (other["first"], other["other"], other["num_prompts"]) == ("rewarded", "head", 2)
    assert other["rewards"]["vowels"]["num_pairs"] == 2
    assert same["num_changed"] == 0 and same["rewards"]["vowels"]["difference"]["mean"] == 0.0


def test_another_head_that_does_not_fit_is_refused_before_any_reply(folder, bad):
    asking = ("eval", "--model", "model", "--head", "head", "--data", "prompts.jsonl", "--reward", VOWELS)
    assert "expects hidden size 48; model 'model' has 32" in refused(*asking, "--compare", bad / "wide")
