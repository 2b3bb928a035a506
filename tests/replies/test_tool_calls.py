from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.errors import ConfigError
from mara_integrations.messages import Tool
from mara_integrations.replies.families import FAMILIES
from mara_integrations.replies.forms import ReplyForm
from mara_integrations.replies.tool_calls import CallParser, JSONMarks

HERMES, LLAMA, MISTRAL = (FAMILIES[name].marks for name in ("qwen_3", "llama", "mistral"))
# What stands before the name, before the arguments, and behind them.
PARTS = {
    HERMES: ('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"),
    LLAMA: ('{"name": "', '", "parameters": ', "}"),
    MISTRAL: ('[{"name": "', '", "arguments": ', "}]"),
}

ADD = Tool("add", "", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
SAY = Tool("say", "", {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]})


def written(syntax: JSONMarks, name: str, arguments: dict[str, Any]) -> str:
    begin, middle, end = PARTS[syntax]
    return f"{begin}{name}{middle}{json.dumps(arguments)}{end}"


def parsed(syntax: JSONMarks, pieces: list[str], names: tuple[str, ...] = ()) -> tuple[str, list[tuple[str, Any]], str]:
    """Text, calls, and the calls' arguments as they were streamed."""
    parser, text, streamed = CallParser(syntax, names), "", ""
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
    syntax: JSONMarks, value: str, before: str, cuts: list[int]
) -> None:
    calls = [("say", {"text": value}), ("add", {"a": 1, "b": {"c": [{}]}})]
    whole = before + "\n".join(written(syntax, *call) for call in calls)
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = [whole[start:end] for start, end in pairwise(places)]

    text, found, streamed = parsed(syntax, pieces)

    assert text == before
    assert found == calls
    assert streamed == "".join(json.dumps(arguments) for _, arguments in calls)


CUTS = st.lists(st.integers(0, 120), max_size=6)


def cut(whole: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(whole), *(place for place in cuts if place < len(whole))})
    return [whole[start:end] for start, end in pairwise(places)]


@pytest.mark.parametrize(
    ("syntax", "reply", "text", "calls"),
    [
        # white space, the order of keys, arguments as a string, the form of OpenAI's API
        (HERMES, '<tool_call>{"name":"add","arguments":{"a":1}}</tool_call>', "", [("add", {"a": 1})]),
        (HERMES, '<tool_call> {"arguments": {"a": 1}, "name": "add"} </tool_call>', "", [("add", {"a": 1})]),
        (HERMES, '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", {"a": 1})]),
        (HERMES, '<tool_call>{"name": "add", "parameters": {"a": 1}, "id": "x"}</tool_call>', "", [("add", {"a": 1})]),
        (HERMES, '<tool_call>{"function": {"name": "add", "arguments": {}}}</tool_call>', "", [("add", {})]),
        (HERMES, '<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
        (HERMES, 'Sure.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}', "Sure.\n", [("add", {"a": 1})]),
        (HERMES, '{"name": "add", "arguments": {"a": 1}}', "", [("add", {"a": 1})]),  # without the tags
        (LLAMA, '{"name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
        (LLAMA, '{"name":"add","parameters":{"a":1}}; {"name":"add","parameters":{"a":2}}', "",
         [("add", {"a": 1}), ("add", {"a": 2})]),
        (LLAMA, '<|python_tag|>{"name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
        (MISTRAL, '[{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 2}}]', "",
         [("add", {"a": 1}), ("add", {"a": 2})]),
        (MISTRAL, '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]', "", [("add", {"a": 1})]),
        (MISTRAL, '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add[CALL_ID]x1[ARGS]{"a": 2}', "",
         [("add", {"a": 1}), ("add", {"a": 2})]),
        # malformed: None
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": }}</tool_call> Done.', "Done.", [("add", None)]),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1</tool_call>', "", [("add", None)]),
        (HERMES, '<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "", [("add", None)]),
        (HERMES, "<tool_call>add(1)</tool_call>", "", [("", None)]),
        (HERMES, '<tool_call>{"arguments": {"a": 1}}</tool_call>', "", [("", None)]),
        (HERMES, '<tool_call>{"name": "ad', "", [("", None)]),
        (HERMES, '{"name": "add", "arguments": {"a": 1', "", [("add", None)]),
        (LLAMA, '{"name": "add", "parameters": {a: 1}}', "", [("add", None)]),
        (LLAMA, '{"name": "add", "para', "", [("add", None)]),
        (MISTRAL, '[{"name": "add", "arguments": {"a": 1', "", [("add", None)]),
        (MISTRAL, '[TOOL_CALLS][{"name": "add", "arguments": 7}]', "", [("add", None)]),
        # other JSON is an answer
        (LLAMA, '{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', []),
        (LLAMA, '{"name": "Ann", "parameters": {}}', '{"name": "Ann", "parameters": {}}', []),
        (HERMES, '{"name": "Ann", "age": 3} is it.', '{"name": "Ann", "age": 3} is it.', []),
        (HERMES, 'As in {"name": "add", "arguments": {}}', 'As in {"name": "add", "arguments": {}}', []),
        (MISTRAL, '[{"name": "Ann"}, 3]', '[{"name": "Ann"}, 3]', []),
        (MISTRAL, "[TOOL_CALLS] me", "[TOOL_CALLS] me", []),
        (HERMES, "<tool_call>", "<tool_call>", []),
    ],
)  # fmt: skip
@given(cuts=CUTS)
def test_calls_as_models_write_them(
    syntax: JSONMarks, reply: str, text: str, calls: list[Any], cuts: list[int]
) -> None:
    found_text, found, streamed = parsed(syntax, cut(reply, cuts), ("add", "now"))

    assert (found_text, found) == (text, calls)
    if found and all(arguments is not None for _, arguments in found):
        decoder, rest, arguments = json.JSONDecoder(), streamed, []
        while rest:
            one, end = decoder.raw_decode(rest)
            arguments, rest = [*arguments, one], rest[end:]
        assert arguments == [arguments for _, arguments in found]


@given(reply=st.text(st.sampled_from('<tool_call>{"name": "add"}/[TOOL_CALLS] ,]\\'), max_size=60), cuts=CUTS)
@pytest.mark.parametrize("syntax", [HERMES, LLAMA, MISTRAL])
def test_any_text_is_parsed_the_same_however_it_is_cut(syntax: JSONMarks, reply: str, cuts: list[int]) -> None:
    assert parsed(syntax, [*cut(reply, cuts), ""], ("add",))[:2] == parsed(syntax, [reply], ("add",))[:2]


def test_what_only_looks_like_a_call_is_text() -> None:
    assert parsed(HERMES, ["a <tool", " b"]) == ("a <tool b", [], "")
    assert parsed(HERMES, ["<tool_call> me"]) == ("<tool_call> me", [], "")


def test_a_call_cut_short_is_kept_as_it_is() -> None:
    parser = CallParser(HERMES)
    parser.push(written(HERMES, "add", {"a": 1})[: -len(PARTS[HERMES][2]) - 1], final=True)

    assert parser.calls[0].arguments == '{"a": 1'
    assert parser.calls[0].parsed is None


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
    assert ReplyForm().grammar(FAMILIES["qwen_3"]) is None
    assert ReplyForm((ADD,), "none").grammar(FAMILIES["qwen_3"]) is None
