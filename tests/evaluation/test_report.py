"""The report says what was found in words that it explains, and fits a phone."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess

import pytest
from rich.console import Console

from mara_integrations.evaluation.comparison import compare
from mara_integrations.evaluation.console import print_regressions, print_summary
from mara_integrations.evaluation.evaluate import evaluate
from mara_integrations.evaluation.provenance import Provenance
from mara_integrations.evaluation.report import (
    glossary,
    render_html,
    summary_rows,
    verdict,
    write_report,
)
from mara_integrations.runtime import MARAEngine
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer


def even(completions, **_):
    return [float(len(text) % 2 == 0) for text in completions]


@pytest.fixture(scope="module")
def evaluation():
    engine = MARAEngine((tiny_model(), tiny_tokenizer()), random_head(32, "residual"))
    return evaluate(engine, [f"prompt {i}" for i in range(6)], {"even": even}, temperature=0.9, max_new_tokens=9)


def test_edits_of_replies_that_were_fine_are_counted():
    found = compare([1.0, 1.0, 1.0, 0.0, None], [1.0, 0.0, 1.0, 1.0, 1.0], [False, True, True, True, True], seed=0)
    assert (found.num_fine, round(found.fine_changed.mean, 3), found.fine_worse) == (3, 0.667, 1)


def test_where_scores_are_not_yes_or_no_the_better_half_was_fine():
    found = compare([0.1, 0.5, 0.9], [0.2, 0.6, 0.8], [True, False, True], seed=0)
    assert (found.num_fine, found.fine_changed.mean, found.fine_worse) == (2, 0.5, 1)


def test_without_fine_replies_there_is_no_share():
    found = compare([0.0, 0.0], [1.0, 0.0], [True, True], seed=0)
    assert (found.num_fine, found.fine_changed, found.fine_worse) == (0, None, 0)


def scored(example, base, gated, log_prob=-1.0):
    return dataclasses.replace(
        example,
        base=dataclasses.replace(example.base, token_ids=(1,), log_probs=(-1.0,), scores={"even": base}),
        gated=dataclasses.replace(example.gated, token_ids=(2,), log_probs=(log_prob,), scores={"even": gated}),
    )


def test_the_worst_regressions_come_first_and_ties_go_by_how_unlikely_the_reply_became(evaluation):
    example = evaluation.examples[0]
    unchanged = dataclasses.replace(example, gated=example.base)
    examples = (
        scored(example, 0.0, 1.0, -9.0),
        scored(example, 1.0, 1.0, -2.0),
        scored(example, 1.0, 0.0),
        scored(example, 1.0, 1.0, -5.0),
        unchanged,
        scored(example, 1.0, None, -3.0),
    )
    assert dataclasses.replace(evaluation, examples=examples).regressions(9) == [2, 3, 5, 1]
    assert dataclasses.replace(evaluation, examples=examples).regressions(1) == [2]


def test_the_verdict_says_what_changed_and_what_was_harmed(evaluation):
    said = verdict(evaluation)
    assert said.startswith("even: ") and "with the head" in said and "perplexity ×" in said
    assert "base replies that were fine were changed" in said


def test_every_measure_is_explained(evaluation):
    words = glossary(evaluation)
    for row in summary_rows(evaluation)[:-3]:
        assert any(word in row.measure for word in words) or row.measure.startswith(("tokens", "replies")), row.measure
    out = io.StringIO()
    print_summary(Console(file=out, width=100), evaluation)
    assert "distinct-2: distinct pairs of tokens" in out.getvalue()


def test_the_console_lists_regressions_with_both_replies(evaluation):
    out = io.StringIO()
    print_regressions(Console(file=out, width=200), evaluation, 2)
    assert out.getvalue().count("base  ") == out.getvalue().count("gated ") <= 2


def test_the_page_and_the_json_say_where_they_come_from(evaluation, tmp_path):
    provenance = Provenance.now("mara-tools eval --head h", "prompts.jsonl", "abcdef0123456789")
    page = render_html(evaluation, provenance)
    assert "mara-tools eval --head h" in page and "prompts.jsonl (abcdef012345)" in page
    write_report(evaluation, tmp_path / "r.json", provenance)
    assert json.loads((tmp_path / "r.json").read_text())["provenance"]["command"] == "mara-tools eval --head h"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_the_page_fits_a_phone(evaluation, tmp_path):
    """A frame of 390 pixels is no wider inside, and each number of the table stands below the other."""
    page = render_html(evaluation).replace("default-src 'none'; ", "")
    (tmp_path / "page.html").write_text(page)
    probe = (
        "<body><iframe id=f src=page.html width=390 height=800></iframe><script>f.onload = () => { const d = "
        "f.contentDocument; const cells = [...d.querySelectorAll('td')].map(c => c.getBoundingClientRect().right); "
        "document.title = d.documentElement.scrollWidth + ' ' + Math.max(...cells); }</script>"
    )
    (tmp_path / "probe.html").write_text(probe)
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom")
    command = ["chromium", *flags, f"--user-data-dir={tmp_path}", "--virtual-time-budget=3000"]
    said = subprocess.run([*command, f"file://{tmp_path}/probe.html"], capture_output=True, text=True, timeout=120)
    wide, rightmost = map(float, said.stdout.partition("<title>")[2].partition("</title>")[0].split())
    assert wide <= 390 and rightmost <= 390
