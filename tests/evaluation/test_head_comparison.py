"""Two heads beside each other: paired by prompt and random numbers, and refused where they are not."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from mara_integrations.errors import ConfigError
from mara_integrations.evaluation.console import print_comparison
from mara_integrations.evaluation.evaluate import evaluate
from mara_integrations.evaluation.head_comparison import compare_heads
from mara_integrations.evaluation.report import render_html
from mara_integrations.runtime import MARAEngine
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer

PROMPTS = [f"prompt {i}" for i in range(6)]


def total(completion_ids, **_):
    return [float(sum(ids)) for ids in completion_ids]


def mute(completions, **_):
    return [None for _ in completions]


@pytest.fixture(scope="module")
def engine():
    return MARAEngine((tiny_model(), tiny_tokenizer()))


@pytest.fixture(scope="module")
def evaluations(engine):
    heads = [random_head(32, "residual", scale=4.0, seed=seed) for seed in (0, 1)]
    rewards = {"total": total, "mute": mute}
    return [evaluate(engine, PROMPTS, rewards, temperature=0.9, max_new_tokens=9, head=head) for head in heads]


def test_the_difference_is_that_of_the_gated_replies_prompt_by_prompt(evaluations):
    first, other = evaluations
    found = compare_heads(first, other)

    pairs = [
        (a.gated.scores["total"], b.gated.scores["total"]) for a, b in zip(first.examples, other.examples, strict=True)
    ]
    scores = found.rewards["total"]
    assert (scores.num_pairs, scores.num_dropped) == (6, 0)
    assert scores.difference.mean == pytest.approx(sum(b - a for a, b in pairs) / 6)
    assert scores.difference.low <= scores.difference.mean <= scores.difference.high
    assert (scores.wins, scores.losses) == (sum(b > a for a, b in pairs), sum(b < a for a, b in pairs))
    assert found.num_changed == sum(
        a.gated.token_ids != b.gated.token_ids for a, b in zip(first.examples, other.examples, strict=True)
    )
    assert found.num_changed > 0, "the heads are different ones"
    assert found.perplexity_ratio.mean == pytest.approx(other.gated.perplexity / first.gated.perplexity)


def test_a_head_beside_itself_differs_in_nothing(evaluations):
    found = compare_heads(evaluations[0], evaluations[0])

    scores = found.rewards["total"]
    assert (scores.wins, scores.ties, scores.losses, found.num_changed) == (0, 6, 0, 0)
    assert dataclasses.astuple(scores.difference) == (0.0, 0.0, 0.0)
    assert dataclasses.astuple(found.perplexity_ratio) == pytest.approx((1.0, 1.0, 1.0))


def test_a_reward_without_opinions_has_no_difference(evaluations):
    scores = compare_heads(*evaluations).rewards["mute"]
    assert (scores.num_pairs, scores.num_dropped, scores.difference) == (0, 6, None)


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"seed": 7}, "seed"), ({"temperature": 0.5}, "temperature"), ({"prompts": PROMPTS[:4]}, "prompts")],
)
def test_replies_under_other_conditions_are_not_compared(engine, evaluations, changed, named):
    settings = {"prompts": PROMPTS, "temperature": 0.9, "max_new_tokens": 9, **changed}
    other = evaluate(engine, settings.pop("prompts"), head=random_head(32, "residual"), **settings)
    with pytest.raises(ConfigError, match=f"differ in {named}"):
        compare_heads(evaluations[0], other)


def test_console_and_page_show_both_heads(evaluations):
    found = dataclasses.replace(compare_heads(*evaluations), first="heads/a", other="heads/<b>")
    out = io.StringIO()

    print_comparison(Console(file=out, width=200), found)
    page = render_html(evaluations[0], comparisons=[found])

    for said in ("total: mean", "wins", "no opinion on any of 6 prompts", "forwards a token"):
        assert said in out.getvalue() and said in page
    assert "heads/<b> (other) against heads/a (first)" in out.getvalue()
    assert "<h2>heads/&lt;b&gt; against heads/a</h2>" in page
    assert " against " not in render_html(evaluations[0])
