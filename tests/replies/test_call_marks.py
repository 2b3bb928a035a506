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
DEEPSEEK = "{{ tools }}{# <｜tool▁calls▁begin｜> #}" + PLAIN
KIMI = "{{ tools }}{# <|tool_calls_section_begin|> #}" + PLAIN
QWEN_CODER = "{{ tools }}{# <tool_call>\n<function= #}" + PLAIN
GLM = "{{ tools }}{# <tool_call> <arg_key> #}" + PLAIN
HARMONY = "{{ tools }}{# <|channel|> <|message|> #}" + PLAIN
THINKING = "{# <think> #}" + PLAIN
BEGUN = PLAIN + "{{ '<think>\n' }}"
OFF = PLAIN + "{{ '<think>\n\n</think>\n\n' }}"

SPECIAL = ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<|im_start|>"]
SPECIAL += [
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
]
SPECIAL += ["<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"]
SPECIAL += ["<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|channel|>", "<|message|>", "<|start|>", "<|end|>"]
SPECIAL += ["<|constrain|>", "<|call|>", "<|return|>"]
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
    (
        DEEPSEEK,
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1, "b": 2}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    (
        KIMI,
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
        '{"a": 1, "b": 2}<|tool_call_end|><|tool_calls_section_end|>',
    ),
    (
        QWEN_CODER,
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n"
        "</function>\n</tool_call>",
    ),
    (
        GLM,
        "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>",
    ),
    (
        HARMONY,
        "<|channel|>analysis<|message|>Sum.<|end|><|start|>assistant"
        '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1, "b": 2}<|call|>',
    ),
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


@pytest.mark.parametrize("template", [MISTRAL, MISTRAL_V11, LLAMA, HERMES, DEEPSEEK, KIMI, QWEN_CODER, GLM, HARMONY])
@pytest.mark.parametrize("choice", ["any", "add"])
def test_a_forced_call_is_written_in_the_familys_way(template: str, choice: str) -> None:
    llm = writes("I would rather talk.", template, SPECIAL, ADDED)

    message = llm.bind_tools([ADD_DIGITS], tool_choice=choice).invoke("hi", max_tokens=200)

    (call,) = message.tool_calls
    assert call["name"] == "add" and set(call["args"]) == {"a", "b"}
    written = llm.engine.model.tokenizer.decode(message.response_metadata["token_ids"])
    begins = {
        MISTRAL: "[TOOL_CALLS] [{",
        MISTRAL_V11: "[TOOL_CALLS]add[ARGS]{",
        LLAMA: '{"name"',
        HERMES: "<tool_call>",
        DEEPSEEK: "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{",
        KIMI: "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:",
        QWEN_CODER: "<tool_call>\n<function=add>\n",
        GLM: "<tool_call>add",
        HARMONY: "",
    }
    assert written.startswith(begins[template])
    marks = {*llm.engine.model.tokenizer.convert_tokens_to_ids([*SPECIAL, *ADDED])}
    is_marked = message.response_metadata["token_ids"][0] in marks  # by the mark, not by its letters
    assert is_marked or template in (LLAMA, HARMONY)  # gpt-oss may name the tool before the channel


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


def test_gpt_oss_answers_in_a_channel_of_its_own() -> None:
    reply = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>"
    llm = writes(reply, HARMONY, SPECIAL, ADDED)

    for message in (llm.invoke("hi"), total(llm.stream("hi")), llm.bind_tools([add]).invoke("hi")):
        assert message.text == "Four." and message.additional_kwargs["reasoning_content"] == "Hm."
    assert llm.chat([ChatMessage("hi")]).message.content == "Four."
    assert llm.complete("hi").text == "Four."


def test_a_call_of_gpt_oss_ends_its_reply() -> None:
    reply = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1, "b": 2}<|call|>and more'
    llm = writes(reply, HARMONY, SPECIAL, ADDED)

    message = llm.bind_tools([add]).invoke("hi")

    assert [call["args"] for call in message.tool_calls] == [{"a": 1, "b": 2}] and message.text == ""
    assert message.response_metadata["finish_reason"] == "stop"
    assert message.response_metadata["token_ids"][-1] == llm.engine.model.tokenizer.convert_tokens_to_ids("<|call|>")


def test_a_raw_prompt_may_end_within_thoughts_and_other_text_is_not_cut() -> None:
    thinks = writes("A cat?</think>Yes.", BEGUN, SPECIAL, ADDED)
    assert thinks.complete("Is it? [assistant] <think>\n", formatted=True).text == "Yes."

    text = " \n <b>Yes</b>, <think> is a tag. "
    assert writes(text, special=SPECIAL, added=ADDED).complete("Is it? [assistant] ", raw=True).text == text
