"""Request bodies: what is accepted, and what is refused with which words."""

from __future__ import annotations

import logging

import pytest
from serving import CHAT, TOOL, USER, post

from mara_integrations.messages import Message, ToolCall
from mara_integrations.server.errors import RefusalError
from mara_integrations.server.names import ServedNames
from mara_integrations.server.requests import read_chat, read_completion, read_json

NAMES = ServedNames("tiny", {"brand": "heads/brand", "calm": "heads/calm"})


def chat(**body):
    return read_chat({"messages": [USER], **body}, NAMES)


def named(function):
    return {"type": "function", "function": {"name": function}}


def refused(read, body) -> RefusalError:
    with pytest.raises(RefusalError) as caught:
        read(body, NAMES)
    return caught.value


# --- accepted


def test_contents_may_be_empty():
    messages = [{"role": "system", "content": ""}, {"role": "assistant", "content": ""}, USER]
    (prompt,) = chat(messages=messages).prompts
    assert prompt == (Message("system"), Message("assistant"), Message("user", "hi"))


def test_a_content_may_come_in_parts():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    (prompt,) = chat(messages=[{"role": "developer", "content": parts}]).prompts
    assert prompt == (Message("system", "one\ntwo"),)


def test_calls_and_their_results_are_read():
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "noon"}]
    (prompt,) = chat(messages=messages).prompts
    assert prompt[0].tool_calls == (ToolCall("c1", "clock", {"zone": "UTC"}),)
    assert (prompt[1].content, prompt[1].tool_call_id) == ("noon", "c1")


@pytest.mark.parametrize(
    "asking_for_nothing",
    [
        {"n": 1},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_p": 0},
        {"logit_bias": {}},
        {"reasoning_effort": "low", "verbosity": "low", "modalities": ["text"], "functions": []},
        {"store": False, "user": "u1", "metadata": {"a": "b"}, "service_tier": "auto"},
        {"tools": [], "parallel_tool_calls": True},
        {"stop": None, "seed": None, "temperature": None, "tools": None, "stream": None, "stream_options": None},
        {"response_format": {"type": "text"}},
        {"head": {"brand": 0}, "stop": []},
    ],
)
def test_values_that_ask_for_nothing_are_accepted(asking_for_nothing):
    assert chat(**asking_for_nothing).ignored == ()


def test_values_that_ask_for_nothing_are_accepted_of_completions_too():
    call = read_completion({"prompt": "once", "echo": False, "best_of": 1, "suffix": "", "n": 1}, NAMES)
    assert call.prompts == ("once",)


def test_unknown_fields_are_ignored_and_named():
    assert chat(temprature=1, enable_thinking=False).ignored == ("temprature", "enable_thinking")
    assert chat(messages=[{**USER, "refusal": None}]).ignored == ()


async def test_unknown_fields_are_logged_once_each(client, caplog):
    with caplog.at_level(logging.WARNING, "mara_integrations.server"):
        for _ in range(2):
            await post(client, **CHAT, temprature=1, **{"x" * 1000: 2})
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "'temprature'" in said[0] and len(said[1]) < 200


def test_the_newer_name_of_max_tokens_goes_first():
    assert chat(max_tokens=3).settings["max_new_tokens"] == 3
    assert chat(max_tokens=3, max_completion_tokens=5).settings["max_new_tokens"] == 5


def test_a_head_is_named_by_the_model_or_by_the_field_and_the_field_goes_first():
    assert chat().settings["head"] is None
    assert chat(model="tiny:brand").settings["head"] == {"heads/brand": 1.0}
    assert chat(model="tiny:brand", head="calm").settings["head"] == {"heads/calm": 1.0}
    assert chat(head=["brand", "brand", "calm"]).settings["head"] == {"heads/brand": 2.0, "heads/calm": 1.0}
    assert chat(head={"brand": 1, "calm": 0.5}).settings["head"] == {"heads/brand": 1.0, "heads/calm": 0.5}


def test_prompts_are_texts_or_token_ids_or_lists_of_either():
    def prompts(prompt):
        return read_completion({"prompt": prompt}, NAMES).prompts

    assert prompts("once") == ("once",)
    assert prompts([70, 71]) == ((70, 71),)
    assert prompts(["once", "upon"]) == ("once", "upon")
    assert prompts(["once", [70, 71]]) == ("once", (70, 71))


# --- refused


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"model": "other"}, 404, "model 'other' is not served (hint: models are tiny, tiny:brand, tiny:calm)"),
        ({"model": "tiny:/etc/passwd"}, 404, "head '/etc/passwd' is not served"),
        ({"model": "tiny:"}, 404, "model 'tiny:' is not served"),
        ({"model": "tinybrand"}, 404, "model 'tinybrand' is not served"),
        ({"head": "../brand"}, 404, "head '../brand' is not served"),
        ({"head": 3}, 400, "head=3 is not allowed"),
        ({"head": {"brand": 10**400}}, 400, "head.brand=an integer of 1329 bits is not allowed"),
        ({"head": {"brand": -1}}, 400, "head.brand=-1 is not allowed"),
        ({"head": []}, 400, "head=[] is not allowed"),
        ({"temperature": -1}, 400, "temperature=-1"),
        ({"temperature": "hot"}, 400, "temperature='hot'"),
        ({"temperature": True}, 400, "temperature=True"),
        ({"max_tokens": 0}, 400, "max_tokens=0"),
        ({"max_tokens": 1.5}, 400, "max_tokens=1.5"),
        ({"seed": 10**300}, 400, "seed=an integer of 997 bits"),
        ({"n": 2}, 400, "n=2 is not supported (hint: leave it out)"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty=0.5 is not supported"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias={'5': 1} is not supported"),
        ({"functions": [{}]}, 400, "functions=[{}] is not supported"),
        ({"messages": None}, 400, "messages=None"),
        ({"messages": []}, 400, "messages=[] is not allowed: list should have at least 1 item"),
        ({"messages": [USER] * 5000}, 400, "list should have at most 4096 items"),
        ({"messages": ["hi"]}, 400, "messages[0]='hi' is not allowed"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role='robot' is not allowed: it should"),
        ({"messages": [{"role": "user"}]}, 400, "'messages[0].content' is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content=5 is not allowed"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "type='image_url' is not allowed"),
        ({"messages": [{**USER, "tool_calls": [{"function": {"name": "f"}}]}]}, 400, "only the assistant calls tools"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": []}]}, 400, "messages[0].tool_call_id=[]"),
        ({"tools": [{"name": 3}]}, 400, "'tools[0].function' is missing"),
        ({"tools": [{"function": {"name": 'a"b'}}]}, 400, "tools[0].function.name='a\"b'"),
        ({"tools": [TOOL] * 200}, 400, "list should have at most 128 items"),
        ({"tools": [TOOL], "tool_choice": "calendar"}, 400, "tool_choice='calendar'"),
        ({"tool_choice": "required"}, 400, "tool_choice='required' needs tools (hint: send tools)"),
        ({"tools": [TOOL], "tool_choice": named("bell")}, 400, "'bell', which is not a tool (hint: tools are clock)"),
        ({"tools": [TOOL], "tool_choice": named("auto")}, 400, "'auto', which is not a tool"),
        ({"tool_choice": named("clock")}, 400, "'clock', which is not a tool (hint: the request has no tools)"),
        ({"response_format": {"type": "json_schema"}}, 400, "'response_format.json_schema' is missing"),
        ({"response_format": {"type": "yaml"}}, 400, "response_format.type='yaml'"),
        ({"logprobs": True, "top_logprobs": 99}, 400, "top_logprobs=99"),
        ({"top_logprobs": 2}, 400, "top_logprobs=2 needs logprobs=true"),
        ({"logprobs": False, "top_logprobs": 0}, 400, "top_logprobs=0 needs logprobs=true"),
        ({"stop": 5}, 400, "stop=5 is not allowed"),
        ({"stop": True}, 400, "stop=True is not allowed"),
        ({"stop": [""]}, 400, "stop[0]='' is not allowed"),
        ({"stop": ["a"] * 100}, 400, "list should have at most 64 items"),
        ({"stream": "yes"}, 400, "stream='yes'"),
        ({"stream_options": 3}, 400, "stream_options=3"),
    ],
)
def test_a_bad_chat_is_refused_with_the_value_and_what_is_allowed(body, status, said):
    refusal = refused(read_chat, {"messages": [USER], **body})
    assert said in refusal.message and refusal.status == status
    assert refusal.param and refusal.param.split(".")[0].split("[")[0] in body


@pytest.mark.parametrize("arguments", ["{", "[1]", "null", "[" * 5000, '{"a":' * 5000, '{"a": NaN}'])
def test_arguments_that_are_no_json_object_are_refused(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    refusal = refused(read_chat, {"messages": [{"role": "assistant", "tool_calls": [call]}]})
    assert refusal.param == "messages[0].tool_calls[0].function.arguments" and len(refusal.message) < 300


@pytest.mark.parametrize(
    "prompt", [None, 5, [], [[]], [True], [-1], [1.5], [2**40], ["a", 3], {"a": 1}, [["a"]], [None]]
)
def test_a_bad_prompt_is_refused(prompt):
    assert refused(read_completion, {"prompt": prompt}).status == 400


def test_a_stream_has_one_prompt():
    assert "a stream has one prompt" in refused(read_completion, {"prompt": ["a", "b"], "stream": True}).message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{} {}",
        b"nul",
        b"\xff",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"seed": NaN}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        "{}".encode("utf-16"),
    ],
)
def test_a_body_that_is_no_json_is_refused(body):
    with pytest.raises(RefusalError, match="the body is not JSON"):
        read_json(body)


@pytest.mark.parametrize("body", [b"[]", b"5", b'"text"', b"null", b"[" * 150 + b"]" * 150])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(RefusalError, match="not a JSON object"):
        read_json(body)


@pytest.mark.parametrize("name", ["x" * 100_000, "\x1b[2J", "/srv/models/secret"])
def test_names_that_are_echoed_are_cut_and_quoted(name):
    for body in ({"model": name}, {"head": name}, {"tool_choice": name}, {"stop": [name] * 99}):
        message = refused(read_chat, {"messages": [USER], **body}).message
        assert len(message) <= 500 and message.isprintable()
