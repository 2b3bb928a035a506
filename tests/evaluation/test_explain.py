from __future__ import annotations

import re

import pytest

from mara_integrations import MARAEngine
from mara_integrations.errors import ConfigError
from mara_integrations.evaluation.explain import explain
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def engine() -> MARAEngine:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    return MARAEngine((model, tokenizer), random_head(32, accept_rate=0.3), max_new_tokens=24)


def shown(html: str) -> str:
    return re.sub(r"<[^>]*>", "", html)


def test_an_explanation_is_the_reply_with_what_the_head_rejected(engine: MARAEngine) -> None:
    explanation = explain(engine, "hi")

    assert str(explanation) == explanation.generation.text == engine.generate("hi").text
    assert "".join(mark.text for mark in explanation.marks) == explanation.generation.text
    assert any(rejected.is_by_head for mark in explanation.marks for rejected in mark.rejected)


def test_a_notebook_shows_the_marks_and_their_meaning(engine: MARAEngine) -> None:
    html = explain(engine, "hi")._repr_html_()

    assert "line-through" in html and "accept logit" in html
    assert "rejected by the head" in shown(html) and "24 tokens" in shown(html)
    assert len(html) < 40_000


@pytest.mark.parametrize("view", ["explanation", "generation"])
def test_what_a_model_writes_is_text_and_no_html(view: str) -> None:
    from mara_integrations.engine.generation import GateStats, Generation
    from mara_integrations.evaluation.explain import Explanation
    from mara_integrations.evaluation.marks import Mark, Rejected

    text = "<script>alert(1)</script> \"' onload=x & \x1b[31m"
    generation = Generation(text, (1,), (-0.5,), 3, "stop", GateStats(accepted=1, rejected=1), thoughts=text)
    struck = Rejected("<img src=x>", -1.0, -2.0, None, is_by_head=True)
    mark = Mark(text, -0.5, 0.5, "accepted", (struck,))

    html = generation._repr_html_() if view == "generation" else Explanation(generation, (mark,))._repr_html_()

    assert "<script" not in html and "<img" not in html and "&lt;script&gt;" in html
    assert {*re.findall(r"<(\w+)", html)} <= {"div", "span", "br", "details", "summary"}


def test_without_a_head_there_is_nothing_to_explain(engine: MARAEngine) -> None:
    with pytest.raises(ConfigError, match="nothing to explain"):
        explain(engine, "hi", head=None)
