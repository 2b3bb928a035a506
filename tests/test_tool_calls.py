from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.errors import ConfigError
from mara_integrations.messages import Tool
from mara_integrations.tool_calls import HERMES, LLAMA, MISTRAL, CallParser, CallSyntax, ReplyForm, syntax_of

ADD = Tool("add", "", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
SAY = Tool("say", "", {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]})


def written(syntax: CallSyntax, name: str, arguments: dict[str, Any]) -> str:
    return f"{syntax.begin}{name}{syntax.middle}{json.dumps(arguments)}{syntax.end}"


def parsed(syntax: CallSyntax, pieces: list[str]) -> tuple[str, list[tuple[str, Any]], str]:
    """Text, calls, and the calls' arguments as they were streamed."""
    parser, text, streamed = CallParser(syntax), "", ""
    for i, piece in enumerate(pieces):
        for news in parser.push(piece, final=i == len(pieces) - 1):
            text += news.text
            streamed += news.call.arguments if news.call else ""
    return text, [(call.name, call.parsed) for call in parser.calls], streamed


@given(
    syntax=st.sampled_from([HERMES, LLAMA, MISTRAL]),
    value=st.text(st.sampled_from('a}{"\\<]é\n'), max_size=6),
    before=st.sampled_from(["", "Well <tool_", "a { b ["]),
    cuts=st.lists(st.integers(0, 200), max_size=5),
)
def test_however_a_reply_is_cut_its_calls_are_the_same(
    syntax: CallSyntax, value: str, before: str, cuts: list[int]
) -> None:
    calls = [("say", {"text": value}), ("add", {"a": 1, "b": {"c": [{}]}})]
    whole = before + "\n".join(written(syntax, *call) for call in calls)
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = [whole[start:end] for start, end in pairwise(places)]

    text, found, streamed = parsed(syntax, pieces)

    assert text == before
    assert found == calls
    assert streamed == "".join(json.dumps(arguments) for _, arguments in calls)


def test_what_only_looks_like_a_call_is_text() -> None:
    assert parsed(HERMES, ["a <tool", " b"]) == ("a <tool b", [], "")
    assert parsed(HERMES, ["<tool_call> me"]) == ("<tool_call> me", [], "")


def test_a_call_cut_short_is_kept_as_it_is() -> None:
    parser = CallParser(HERMES)
    parser.push(written(HERMES, "add", {"a": 1})[: -len(HERMES.end) - 1], final=True)

    assert parser.calls[0].arguments == '{"a": 1'
    assert parser.calls[0].parsed is None


@pytest.mark.parametrize(
    ("template", "syntax"),
    [
        (None, HERMES),
        ("<tool_call>{{ tools }}", HERMES),
        ("{{ '[TOOL_CALLS]' }}", MISTRAL),
        ('ipython {"name": ..., "parameters": ...}', LLAMA),
    ],
)
def test_the_syntax_is_the_templates_own(template: str | None, syntax: CallSyntax) -> None:
    assert syntax_of(template) is syntax


@pytest.mark.parametrize("choice", ["sub", "Any"])
def test_a_choice_that_is_no_tool_is_refused(choice: str) -> None:
    with pytest.raises(ConfigError, match="allowed: auto, none, any, add"):
        ReplyForm((ADD,), choice)


def test_a_choice_without_tools_is_refused() -> None:
    with pytest.raises(ConfigError, match="there are no tools"):
        ReplyForm(tool_choice="any")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, "auto"),
        (True, "any"),
        ("required", "any"),
        ({"type": "function", "function": {"name": "add"}}, "add"),
        ({"type": "any"}, "any"),
    ],
)
def test_the_words_of_other_apis_are_understood(given: Any, meant: str) -> None:
    tool = {"type": "function", "function": {"name": "add"}}

    assert ReplyForm.of_call({"tools": [tool], "tool_choice": given}).tool_choice == meant


def test_free_replies_have_no_grammar() -> None:
    assert ReplyForm().grammar(HERMES) is None
    assert ReplyForm((ADD,), "none").grammar(HERMES) is None
