"""Thoughts of a reasoning model are no part of its answer, by whatever door the reply leaves."""

from __future__ import annotations

import pytest
from llama_index.core.llms import ChatMessage
from scripted import TEMPLATE, TURN, writes

from mara_integrations import MARALLM
from mara_integrations.evaluation.explain import explain
from mara_integrations.messages import Tool
from mara_integrations.replies.forms import ReplyForm
from mara_integrations.testing import random_head

MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
BEGUN = TEMPLATE + "{{ '<think>\n' }}"
REPLY = "<think>\nA cat?\n</think>\n\nYes."


@pytest.fixture(scope="module", params=["one token", "special", "letters"])
def llm(request: pytest.FixtureRequest) -> MARALLM:
    """Writes `REPLY`; the marks in it are tokens of their own, special tokens, or spelled out."""
    added, special = ({"one token": (MARKS, []), "special": ([], MARKS), "letters": ([], [])})[request.param]
    return writes(REPLY, added=added, special=special)


def test_the_engine_tells_thoughts_and_answer_apart(llm: MARALLM) -> None:
    generation = llm.engine.generate("Is it?")

    assert (generation.thoughts, generation.text, generation.raw_text) == ("A cat?", "Yes.", REPLY)
    assert llm.engine.generate_batch(["Is it?"])[0].text == "Yes."


async def test_a_stream_tells_them_apart_while_they_are_written(llm: MARALLM) -> None:
    updates = list(llm.engine.stream("Is it?"))

    assert "".join(update.thoughts for update in updates) == "A cat?"
    assert "".join(update.text for update in updates) == "Yes."
    assert "".join(update.raw_text for update in updates) == REPLY
    assert max(len(update.thoughts + update.text) for update in updates) < len("A cat?")
    assert [update.text async for update in llm.engine.astream("Is it?")] == [update.text for update in updates]
    assert (await llm.engine.agenerate("Is it?")).thoughts == "A cat?"


def test_every_framework_says_the_same(llm: MARALLM) -> None:
    message = llm.invoke("Is it?")
    chat = llm.chat([ChatMessage("Is it?")])

    assert message.text == "Yes."
    assert chat.message.content == llm.complete("Is it?").text == "Yes."


def test_a_prompt_may_begin_the_thoughts() -> None:
    reply = "A cat?</think>Yes."
    by_template, by_hand = (writes(reply, template, added=MARKS).engine for template in (BEGUN, TEMPLATE))
    generations = [
        by_template.generate("Is it?"),
        by_template.generate(by_template.encode("Is it?")),
        by_template.generate(f"[user] Is it?\n{TURN}<think>\n", raw=True),
    ]

    assert [(generation.thoughts, generation.text) for generation in generations] == [("A cat?", "Yes.")] * 3
    assert by_hand.generate("Is it?").text == reply


def test_thoughts_that_are_cut_are_no_answer(llm: MARALLM) -> None:
    generation = llm.engine.generate("Is it?", max_new_tokens=len(llm.engine.generate("Is it?").token_ids) - 8)

    assert generation.finish_reason == "length" and generation.text == ""
    assert generation.thoughts.startswith("A ca")


def test_a_later_mark_is_text() -> None:
    generation = writes("No <think>.</think>", added=MARKS).engine.generate("Is it?")

    assert (generation.thoughts, generation.text) == ("", "No <think>.</think>")


def test_calls_are_no_part_of_the_text_either() -> None:
    reply = '<think>\nSum.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    engine = writes(reply, "{{ tools }}{# <tool_call> #}" + TEMPLATE, added=MARKS).engine
    form = ReplyForm((Tool("add", "", {"type": "object", "properties": {"a": {"type": "integer"}}}),))

    generation = engine.generate("1?", form=form)

    assert (generation.thoughts, generation.text) == ("Sum.", "")
    assert [(call.name, call.parsed) for call in generation.calls] == [("add", {"a": 1})]
    parts = [update.calls[0].arguments for update in engine.stream("1?", form=form) if update.calls]
    assert parts == sorted(parts, key=len) and len(parts) > 2 and parts[-1] == generation.calls[0].arguments


def test_an_explanation_marks_the_thoughts_too(llm: MARALLM) -> None:
    explanation = explain(llm.engine, "Is it?", head=random_head(32), strength=0.0)

    assert "".join(mark.text for mark in explanation.marks) == REPLY and str(explanation) == "Yes."


def test_a_notebook_folds_the_thoughts(llm: MARALLM) -> None:
    html = llm.engine.generate("Is it?")._repr_html_()

    assert "<details><summary>thoughts</summary>A cat?</details>" in html and ">Yes.<" in html
