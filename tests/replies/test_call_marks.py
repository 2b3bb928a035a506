"""Calls and thoughts in the ways of model families whose marks are tokens of their own, from token ids to messages."""

from __future__ import annotations

import operator
from functools import partial, reduce

import pytest
from langchain_core.tools import tool
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel
from scripted import TEMPLATE, writes

PLAIN = TEMPLATE
# What a template says of the family: its marks, and where tools go.
MISTRAL = "{{ tools }}{# [TOOL_CALLS] #}" + PLAIN
MISTRAL_V11 = "{{ tools }}{# [TOOL_CALLS] [ARGS] #}" + PLAIN
LLAMA = '{{ tools }}{# ipython "parameters": #}' + PLAIN
HERMES = "{{ tools }}{# <tool_call> #}" + PLAIN
THINKING = "{# <think> #}" + PLAIN
BEGUN = PLAIN + "{{ '<think>\n' }}"
OFF = PLAIN + "{{ '<think>\n\n</think>\n\n' }}"

SPECIAL = ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<|im_start|>"]
ADDED = ["<tool_call>", "</tool_call>", "<think>", "</think>"]  # of Qwen: tokens of their own, not special


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


total = partial(reduce, operator.add)  # of the chunks of a stream


CALLS = [
    (MISTRAL, '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}}]'),
    (MISTRAL, '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": 2}}]'),
    (MISTRAL_V11, '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}'),
    (MISTRAL_V11, '[TOOL_CALLS]add[CALL_ID]x1[ARGS]{"a": 1, "b": 2}'),
    (LLAMA, '<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2}}'),
    (LLAMA, '{"name": "add", "parameters": {"a": 1, "b": 2}}'),
    (HERMES, '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'),
]


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize(("template", "reply"), CALLS)
def test_a_call_is_read_whether_its_marks_are_special_tokens_or_not(
    template: str, reply: str, is_special: bool
) -> None:
    marks = [*SPECIAL, *ADDED]
    llm = writes(reply, template, special=marks if is_special else [], added=[] if is_special else marks)
    caller = llm.bind_tools([add])

    for message in (caller.invoke("hi"), total(caller.stream("hi"))):
        assert [(call["name"], call["args"]) for call in message.tool_calls] == [("add", {"a": 1, "b": 2})]
        assert message.text == "" and not message.invalid_tool_calls
    response = llm.chat_with_tools([FunctionTool.from_defaults(add.func)], "hi")
    assert [call.tool_kwargs for call in llm.get_tool_calls_from_response(response)] == [{"a": 1, "b": 2}]


DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
ADD_DIGITS = {"title": "add", "type": "object", "properties": {"a": DIGIT, "b": DIGIT}, "required": ["a", "b"]}


@pytest.mark.parametrize("template", [MISTRAL, MISTRAL_V11, LLAMA, HERMES])
@pytest.mark.parametrize("choice", ["any", "add"])
def test_a_forced_call_is_written_in_the_familys_way(template: str, choice: str) -> None:
    llm = writes("I would rather talk.", template, SPECIAL, ADDED)

    message = llm.bind_tools([ADD_DIGITS], tool_choice=choice).invoke("hi", max_tokens=90)

    (call,) = message.tool_calls
    assert call["name"] == "add" and set(call["args"]) == {"a", "b"}
    written = llm.engine.model.tokenizer.decode(message.response_metadata["token_ids"])
    begins = {
        MISTRAL: "[TOOL_CALLS] [{",
        MISTRAL_V11: "[TOOL_CALLS]add[ARGS]{",
        LLAMA: '{"name"',
        HERMES: "<tool_call>",
    }
    assert written.startswith(begins[template])
    ids = llm.engine.model.tokenizer.convert_tokens_to_ids(["[TOOL_CALLS]", "<tool_call>"])
    assert (message.response_metadata["token_ids"][0] in ids) == (template != LLAMA)  # the mark itself, not its letters


def test_other_special_tokens_stay_out_of_the_text() -> None:
    llm = writes("<|im_start|>Well.[TOOL_CALLS]<|im_start|> me", MISTRAL, SPECIAL, ADDED)

    assert llm.bind_tools([add]).invoke("hi").text == "Well.[TOOL_CALLS] me"
    assert llm.invoke("hi").text == "Well. me"  # without tools there are no calls to be read


class Answer(BaseModel):
    is_cat: bool


JSON = '{"is_cat": true}'


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize(
    ("template", "thoughts"),
    [(THINKING, "<think>\nA \"cat\"? {\n</think>\n\n"), (THINKING, ""), (BEGUN, "A cat? {\n</think>\n\n"), (OFF, "")],
)  # fmt: skip
def test_a_model_thinks_before_it_is_held_to_a_form(template: str, thoughts: str, is_special: bool) -> None:
    marks = {"special": ADDED, "added": []} if is_special else {"special": [], "added": ADDED}
    call = f'<tool_call>\n{{"name": "Answer", "arguments": {JSON}}}\n</tool_call>'

    json_llm, call_llm = (writes(thoughts + end, template, **marks) for end in (JSON, call))

    raw = json_llm.with_structured_output(Answer, include_raw=True).invoke("hi")
    assert raw["parsed"] == Answer(is_cat=True)
    reasoning = raw["raw"].additional_kwargs.get("reasoning_content", "")
    assert bool(thoughts) == reasoning.startswith("A ") and "think" not in reasoning
    assert list(json_llm.with_structured_output(Answer).stream("hi"))[-1] == Answer(is_cat=True)
    forced = call_llm.bind_tools([Answer], tool_choice="Answer").invoke("hi")
    assert [each["args"] for each in forced.tool_calls] == [{"is_cat": True}]
    assert forced.additional_kwargs.get("reasoning_content", "") == reasoning
    response = json_llm.as_structured_llm(Answer).chat([ChatMessage("hi")])
    assert isinstance(response.raw, Answer)


@pytest.mark.parametrize(("template", "thoughts"), [(THINKING, "<think>\n"), (BEGUN, "")])
def test_thoughts_without_end_are_cut_and_no_answer_is_made_up(template: str, thoughts: str) -> None:
    llm = writes(thoughts + "Hm. " * 200, template, SPECIAL, ADDED)

    raw = llm.with_structured_output(Answer, include_raw=True).invoke("hi")

    assert raw["parsed"] is None and "raise max_tokens" in str(raw["parsing_error"])
    assert raw["raw"].text == ""
    assert raw["raw"].additional_kwargs["reasoning_content"].startswith("Hm. Hm.")
    assert raw["raw"].response_metadata["finish_reason"] == "length"
