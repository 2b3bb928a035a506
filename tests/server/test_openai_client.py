"""The `openai` package as a client: what works with OpenAI's API works with this server."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from serving import TOOL, serving

pytest.importorskip("uvicorn", reason="needs the serve extra")

from pydantic import BaseModel

from mara_integrations.messages import Message
from mara_integrations.server import create_app

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def url(engine, folder):
    heads = {name: str(folder / name) for name in ("brand", "calm")}
    with serving(create_app(engine, heads, name="tiny", api_key="secret")) as port:
        yield f"http://127.0.0.1:{port}/v1"


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="secret", timeout=60, max_retries=0) as client:
        yield client


def chat(client, **settings):
    return client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "max_tokens": 6, **settings})


# --- models


def test_models_are_listed_and_described(client):
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:brand", "tiny:calm"]
    assert client.models.retrieve("tiny:brand").id == "tiny:brand"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


# --- chats


def test_a_chat(client, engine):
    answer = chat(client)
    expected = engine.generate([Message("user", "hi")], max_new_tokens=6)
    assert answer.choices[0].message.content == expected.text and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 6 and answer.usage.prompt_tokens == expected.prompt_tokens


def test_heads_by_the_models_name_and_by_extra_fields(client):
    by_name = chat(client, model="tiny:brand")
    by_field = chat(client, extra_body={"head": "brand", "strength": 1.0})
    assert by_name.choices[0].message.content == by_field.choices[0].message.content
    base = chat(client, extra_body={"head": "brand", "strength": 0})
    assert base.choices[0].message.content == chat(client).choices[0].message.content


def test_a_stream_with_usage(client):
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_the_stream_helper(client):
    text = chat(client).choices[0].message.content
    with client.chat.completions.stream(model="tiny", messages=HELLO, max_tokens=6, stop=text[3]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()  # a reply that was cut would be an error of this helper
    assert "content.delta" in kinds and final.choices[0].message.content == text[: text.index(text[3])]


@pytest.mark.parametrize(
    "settings",
    [
        {"n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}},
        {"reasoning_effort": "low", "verbosity": "low", "store": False, "service_tier": "auto"},
        {"user": "u", "metadata": {"a": "b"}, "parallel_tool_calls": True, "modalities": ["text"]},
        {"max_completion_tokens": 6, "max_tokens": openai.omit},
        {"extra_body": {"enable_thinking": False, "repetition_penalty": 1.0}},
        {"temperature": 0.7, "top_p": 0.9, "seed": 5},
        {"messages": [{"role": "developer", "content": "Be brief."}, *HELLO]},
        {"messages": [{"role": "system", "content": ""}, *HELLO]},
        {"messages": [*HELLO, {"role": "assistant", "content": ""}, *HELLO]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
    ],
)
def test_what_clients_send_is_accepted(client, settings):
    assert chat(client, **settings).usage.completion_tokens <= 6


def test_seeds_repeat_and_stop_strings_end(client):
    sampled = [chat(client, temperature=1.5, seed=7).choices[0].message.content for _ in range(2)]
    assert sampled[0] == sampled[1]
    stopped = chat(client, stop=[sampled[0][2]], temperature=1.5, seed=7)
    assert stopped.choices[0].message.content == sampled[0][: sampled[0].index(sampled[0][2])]
    assert stopped.choices[0].finish_reason == "stop"


def test_log_probabilities(client):
    content = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 6 and all(len(token.top_logprobs) == 3 for token in content)
    assert all(token.logprob <= 0 for token in content)


# --- tools and schemas


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "clock"}}])
def test_tools_that_must_be_called(client, choice):
    pytest.importorskip("xgrammar", reason="needs the tools extra")
    answer = chat(client, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, max_tokens=120)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "clock" and json.loads(call.function.arguments) == {}
    assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None


def test_a_streamed_tool_call(client):
    pytest.importorskip("xgrammar", reason="needs the tools extra")
    with client.chat.completions.stream(
        model="tiny", messages=HELLO, max_tokens=120, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.name == "clock"


def test_the_turn_after_a_tool(client):
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    assert chat(client, messages=messages, tools=[TOOL], tool_choice="auto").choices[0].message.role == "assistant"
    assert chat(client, messages=messages, tools=[TOOL], tool_choice="none").choices[0].message.tool_calls is None


class Answer(BaseModel):
    ok: bool


def test_schemas(client):
    pytest.importorskip("xgrammar", reason="needs the tools extra")
    parsed = client.chat.completions.parse(model="tiny", messages=HELLO, max_tokens=80, response_format=Answer)
    assert isinstance(parsed.choices[0].message.parsed, Answer)
    free = chat(client, response_format={"type": "json_object"}, max_tokens=200, seed=3, temperature=1.0)
    assert free.choices[0].message.content.lstrip().startswith("{")


def test_a_form_that_does_not_fit_is_cut_and_said_to_be(client):
    pytest.importorskip("xgrammar", reason="needs the tools extra")
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "minLength": 30}, "paid": {"type": "boolean"}},
        "required": ["name", "paid"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "refund", "schema": schema}}
    cut = chat(client, response_format=form, max_tokens=12).choices[0]
    assert cut.finish_reason == "length"
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        json.loads(cut.message.content)
    tool = {"type": "function", "function": {"name": "refund", "parameters": schema}}
    cut = chat(client, tools=[tool], tool_choice="required", max_tokens=60).choices[0]
    assert cut.finish_reason == "length"
    for call in cut.message.tool_calls or ():
        with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
            json.loads(call.function.arguments)


# --- completions


def test_completions_whole_in_lists_and_streamed(client):
    whole = client.completions.create(model="tiny", prompt="once", max_tokens=5, logprobs=2, echo=False, suffix="")
    assert whole.object == "text_completion" and len(whole.choices[0].logprobs.tokens) == 5
    several = client.completions.create(model="tiny", prompt=["once", "upon"], max_tokens=5)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == whole.choices[0].text
    chunks = client.completions.create(model="tiny", prompt="once", max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


# --- errors and concurrency


@pytest.mark.parametrize(
    ("settings", "error", "code"),
    [
        ({"model": "gpt-4"}, "NotFoundError", "model_not_found"),
        ({"extra_body": {"head": "other"}}, "NotFoundError", "model_not_found"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "BadRequestError", "context_length_exceeded"),
        ({"n": 2}, "BadRequestError", None),
        ({"temperature": -1}, "BadRequestError", None),
        ({"frequency_penalty": 0.5}, "BadRequestError", None),
    ],
)
def test_errors_are_those_of_the_client(client, settings, error, code):
    with pytest.raises(getattr(openai, error)) as caught:
        chat(client, **settings)
    assert caught.value.code == code and caught.value.type == "invalid_request_error"


def test_a_wrong_key_is_an_authentication_error(url):
    with openai.OpenAI(base_url=url, api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


async def test_many_at_once_get_what_they_get_alone(url):
    async with openai.AsyncOpenAI(base_url=url, api_key="secret", timeout=60) as client:
        prompts = [f"number {i}" for i in range(8)]

        async def ask(prompt):
            answer = await client.completions.create(model="tiny", prompt=prompt, max_tokens=12)
            return answer.choices[0].text

        together = await asyncio.gather(*map(ask, prompts))
        assert together == [await ask(prompt) for prompt in prompts]


async def test_an_overloaded_server_is_asked_again(engine):
    with serving(create_app(engine, name="tiny", max_running=1)) as port:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=8) as client:
            asked = [client.completions.create(model="tiny", prompt="once", max_tokens=30) for _ in range(3)]
            assert len({answer.choices[0].text for answer in await asyncio.gather(*asked)}) == 1
