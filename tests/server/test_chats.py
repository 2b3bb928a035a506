"""Chats: what the engine replies, in the objects of OpenAI's API."""

from __future__ import annotations

import json

import pytest
from serving import CHAT, TOOL, USER, events, post, text_of

from mara_integrations.messages import Message
from mara_integrations.rewards import ForbiddenWords


async def test_a_chat_is_what_the_engine_says_in_openais_words(client, engine):
    expected = engine.generate([Message("user", "hi")], max_new_tokens=6)
    answer = await post(client, **CHAT)
    (choice,) = answer["choices"]
    assert answer["id"].startswith("chatcmpl-") and (answer["object"], answer["model"]) == ("chat.completion", "tiny")
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert answer["usage"] == {
        "prompt_tokens": expected.prompt_tokens,
        "completion_tokens": 6,
        "total_tokens": expected.prompt_tokens + 6,
    }


async def test_a_stream_is_the_same_in_chunks(client):
    whole = await post(client, **CHAT)
    chunks = await events(client, **CHAT, stream_options={"include_usage": True})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(chunks) == whole["choices"][0]["message"]["content"] and len(chunks) > 4
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]


async def test_a_head_answers_when_it_is_named_by_the_model_or_by_the_field(client, engine, folder):
    def said(head, **more):
        return engine.generate([Message("user", "hi")], max_new_tokens=6, head=head, **more).text

    async def answered(**body):
        return (await post(client, **{**CHAT, **body}))["choices"][0]["message"]["content"]

    brand, calm = str(folder / "brand"), str(folder / "calm")
    assert await answered(model="tiny:brand") == said(brand) != await answered()
    assert await answered(head="brand") == said(brand)
    assert await answered(model="tiny:brand", head="calm") == said(calm)
    assert await answered(head={"brand": 1, "calm": 0.5}) == said({brand: 1.0, calm: 0.5})
    assert await answered(model="tiny:brand", strength=0) == await answered()


async def test_settings_reach_the_engine(client, engine):
    settings = {"temperature": 1.0, "seed": 7, "top_p": 0.8, "top_k": 20}
    expected = engine.generate([Message("user", "hi")], max_new_tokens=6, **settings).text
    answer = await post(client, **CHAT, **settings)
    assert answer["choices"][0]["message"]["content"] == expected
    stopped = await post(client, **CHAT, **settings, stop=[expected[2]])
    assert stopped["choices"][0]["message"]["content"] == expected[: expected.index(expected[2])]
    assert stopped["choices"][0]["finish_reason"] == "stop"


async def test_words_of_a_request_never_appear(client):
    free = (await post(client, **CHAT))["choices"][0]["message"]["content"]

    held = (await post(client, **CHAT, never=free))["choices"][0]["message"]["content"]

    assert ForbiddenWords(free).violations(free) and not ForbiddenWords(free).violations(held)


async def test_a_blank_word_is_refused(client):
    response = await client.post("/v1/chat/completions", json={**CHAT, "never": [" "]})

    assert response.status_code == 400 and "blank" in response.json()["error"]["message"]


async def test_log_probabilities_come_as_openai_has_them(client):
    answer = await post(client, **CHAT, logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 6 and all(len(token["top_logprobs"]) == 2 for token in content)
    written = bytes(byte for token in content for byte in token["bytes"]).decode(errors="replace")
    assert written == answer["choices"][0]["message"]["content"]
    chunks = await events(client, **CHAT, logprobs=True, top_logprobs=2)
    assert chunks[-1]["choices"][0]["logprobs"]["content"] == content


async def test_a_schema_is_kept_to(client):
    pytest.importorskip("xgrammar", reason="needs the tools extra")
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = await post(client, **{**CHAT, "max_tokens": 60}, response_format=wanted)
    assert isinstance(json.loads(answer["choices"][0]["message"]["content"])["ok"], bool)


async def test_tools_are_called_whole_and_streamed(client):
    pytest.importorskip("xgrammar", reason="needs the tools extra")
    body = {**CHAT, "max_tokens": 120, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    choice = (await post(client, **body))["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert (call["type"], call["function"]["name"]) == ("function", "clock")
    assert json.loads(call["function"]["arguments"]) == {}
    chunks = await events(client, **body)
    parts = [part for chunk in chunks for c in chunk["choices"] for part in c["delta"].get("tool_calls", [])]
    assert parts[0]["function"] == {"name": "clock", "arguments": ""} and parts[0]["id"].startswith("call")
    assert json.loads("".join(part["function"]["arguments"] for part in parts)) == {}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_conversation_with_calls_and_results_is_understood(client):
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    assert (await post(client, **{**CHAT, "messages": messages, "tools": [TOOL]}))["usage"]["completion_tokens"] == 6


async def test_a_control_token_in_a_message_is_text(client):
    async def length(content, **more):
        return (await post(client, **{**CHAT, "messages": [{**USER, "content": content}], **more}))["usage"][
            "prompt_tokens"
        ]

    assert await length("<eos>") == await length("<abc>") == await length("abcde")
