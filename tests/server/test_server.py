"""The HTTP server: what OpenAI's clients send and get, which heads answer, what is refused, and when it stops."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

pytest.importorskip("fastapi", reason="needs the serve extra")

from fastapi.testclient import TestClient

from mara_integrations.cli import app as cli
from mara_integrations.messages import Message
from mara_integrations.runtime import MARAEngine, worker_for
from mara_integrations.server import create_app
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer

USER = {"role": "user", "content": "hi"}
CHAT = {"model": "tiny", "messages": [USER], "max_tokens": 6}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    for seed, name in enumerate(("brand", "calm")):
        random_head(32, "residual", seed=seed).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def engine():
    return MARAEngine((tiny_model(), tiny_tokenizer())).load()


@pytest.fixture
def app(engine, folder):
    return create_app(engine, {name: str(folder / name) for name in ("brand", "calm")}, name="tiny")


@pytest.fixture
async def client(app):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://mara") as client:
        yield client


async def post(client, path="chat/completions", *, status=200, **body) -> dict[str, Any]:
    response = await client.post(f"/v1/{path}", json=body)
    assert response.status_code == status, response.text
    return response.json()


async def events(client, path="chat/completions", **body) -> list[dict[str, Any]]:
    """The chunks of a stream, which has to end as OpenAI's do."""
    response = await client.post(f"/v1/{path}", json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, last = response.text.strip().split("\n\n")
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


# --- chats


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


# --- completions


async def test_a_completion_continues_the_text(client, engine):
    answer = await post(client, "completions", model="tiny", prompt="once", max_tokens=5, logprobs=2)
    (choice,) = answer["choices"]
    assert answer["object"] == "text_completion"
    assert choice["text"] == engine.generate("once", max_new_tokens=5).text
    assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"]) == 5
    assert choice["logprobs"]["text_offset"][:2] == [0, len(choice["logprobs"]["tokens"][0])]


async def test_several_prompts_have_a_choice_each(client, engine):
    answer = await post(client, "completions", prompt=["once", [70, 71]], max_tokens=4)
    expected = [engine.generate(prompt, max_new_tokens=4).text for prompt in ("once", [70, 71])]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert answer["usage"]["completion_tokens"] == 8


async def test_a_completion_streams(client):
    whole = await post(client, "completions", prompt="once", max_tokens=5)
    chunks = await events(client, "completions", prompt="once", max_tokens=5)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


# --- what is refused


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"model": "other"}, 404, "model 'other' is not served (hint: models are tiny, tiny:brand, tiny:calm)"),
        ({"model": "tiny:/etc/passwd"}, 404, "head '/etc/passwd' is not served"),
        ({"model": "tiny:"}, 404, "model 'tiny:' is not served"),
        ({"model": "tinybrand"}, 404, "model 'tinybrand' is not served"),
        ({"head": "../brand"}, 404, "head '../brand' is not served"),
        ({"head": 3}, 400, "head=3 is not allowed"),
        ({"temperature": -1}, 400, "temperature=-1"),
        ({"temperature": "hot"}, 400, "temperature='hot'"),
        ({"max_tokens": 0}, 400, "max_new_tokens=0"),
        ({"n": 2}, 400, "n=2 is not offered"),
        ({"temprature": 1}, 400, "'temprature' is no field"),
        ({"messages": None}, 400, "'messages' is missing"),
        ({"messages": []}, 400, "'messages' is an empty list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "has the role 'robot'"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, 400, "maximum context length"),
        ({"tools": [{"name": 3}]}, 400, "{'name': 3} is no function"),
        ({"response_format": {"type": "json_schema"}}, 400, "another form than OpenAI's"),
        ({"tools": [TOOL], "tool_choice": "calendar"}, 400, "tool_choice='calendar'"),
        ({"logprobs": True, "top_logprobs": 99}, 400, "99 log-probabilities"),
        ({"stream": "yes"}, 400, "stream is true or false"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_request_is_an_error_of_openais_shape(client, body, status, said, stream):
    error = (await post(client, status=status, **{**CHAT, "stream": stream, **body}))["error"]
    assert said in error["message"] and error["type"] == "invalid_request_error"
    assert error["code"] == ("model_not_found" if status == 404 else None)


async def test_a_body_that_is_no_json_is_refused(client):
    response = await client.post("/v1/chat/completions", content=b"{")
    assert response.status_code == 400 and "no JSON" in response.json()["error"]["message"]


async def test_an_unknown_route_is_an_error_of_the_same_shape(client):
    assert "/v1/embeddings: Not Found" in (await post(client, "embeddings", status=404))["error"]["message"]


async def test_an_error_in_a_stream_is_told_in_the_stream(client, engine, monkeypatch):
    def broken(segments):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(worker_for(engine.model)._decoder.backend, "feed", broken)
    response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"] == {"message": "no memory left", "type": "server_error", "param": None, "code": None}


async def test_with_a_key_only_those_who_know_it_are_served(engine):
    app = create_app(engine, name="tiny", api_key="secret")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://mara") as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            for response in (
                await client.post("/v1/chat/completions", json=CHAT, headers=headers),
                await client.get("/v1/models", headers=headers),
            ):
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        right = {"Authorization": "Bearer secret"}
        assert (await client.post("/v1/chat/completions", json=CHAT, headers=right)).status_code == 200
        assert (await client.get("/health")).status_code == 200


# --- around it


async def test_models_are_the_base_and_it_with_each_head(client):
    listed = (await client.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["tiny", "tiny:brand", "tiny:calm"]


async def test_counts_are_kept(client):
    await post(client, **CHAT)
    await post(client, status=404, **{**CHAT, "model": "other"})
    await events(client, **CHAT)
    said = (await client.get("/metrics")).text
    for line in (
        'mara_requests_total{endpoint="chat",status="200"} 2',
        'mara_requests_total{endpoint="chat",status="404"} 1',
        'mara_tokens_total{kind="completion"} 12',
        "mara_requests_running 0",
    ):
        assert line in said.splitlines()


class Caller:
    """A client at the other end of an ASGI application, who leaves when it likes."""

    def __init__(self, app, body):
        self.app, self.body = app, json.dumps(body).encode()
        self.has_sent, self.leaves = False, asyncio.Event()
        self.heard = asyncio.Event()

    async def call(self):
        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "query_string": b"",
        }
        await self.app({**scope, "path": "/v1/chat/completions", "headers": headers}, self.receive, self.send)

    async def receive(self):
        if not self.has_sent:
            self.has_sent = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if message["type"] == "http.response.body" and message.get("body"):
            self.heard.set()


async def until(condition):
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise TimeoutError


@pytest.mark.parametrize("stream", [True, False])
async def test_when_the_client_leaves_the_model_stops_within_a_token(app, engine, monkeypatch, stream):
    decoder, count = worker_for(engine.model)._decoder, 0
    feed = decoder.backend.feed

    def counting(segments):
        nonlocal count
        count += 1
        return feed(segments)

    monkeypatch.setattr(decoder.backend, "feed", counting)
    caller = Caller(app, {**CHAT, "max_tokens": 400, "stream": stream})
    call = asyncio.create_task(caller.call())
    await until(lambda: count >= 5 and (caller.heard.is_set() or not stream))
    caller.leaves.set()
    await asyncio.wait_for(call, 10)
    before = count
    await until(lambda: decoder.is_idle)
    assert count - before <= 2 and count < 200
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://mara") as client:
        assert 'status="499"} 1' in (await client.get("/metrics")).text


@pytest.mark.parametrize("stream", [True, False])
async def test_more_requests_than_may_run_are_sent_away(engine, stream):
    app = create_app(engine, name="tiny", max_running=1)
    caller = Caller(app, {**CHAT, "max_tokens": 400, "stream": stream})
    call = asyncio.create_task(caller.call())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://mara") as client:
        for _ in range(10_000):
            if "mara_requests_running 1" in (await client.get("/metrics")).text:
                break
            await asyncio.sleep(0.001)
        answer = await post(client, status=503, **CHAT)
        assert answer["error"]["code"] == "overloaded" and "1 requests are running" in answer["error"]["message"]
        caller.leaves.set()
        await asyncio.wait_for(call, 10)
        await post(client, **CHAT)


def test_mara_tools_serves_a_model_with_its_heads(folder, tmp_path, monkeypatch):
    uvicorn = pytest.importorskip("uvicorn", reason="needs the serve extra")
    served = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **settings: served.update(settings, app=app))
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MARA_API_KEY", "secret")

    arguments = ["serve", "--model", "model", "--head", f"brand={folder / 'brand'}", "--port", "9000"]
    said = CliRunner().invoke(cli, arguments)

    assert said.exit_code == 0 and "model, model:brand" in said.stdout and "http://127.0.0.1:9000/v1" in said.stdout
    with TestClient(served["app"]) as client:
        headers = {"Authorization": "Bearer secret"}
        answer = client.post("/v1/chat/completions", json={**CHAT, "model": "model:brand"}, headers=headers)
        assert answer.status_code == 200 and client.get("/v1/models").status_code == 401
    assert served["port"] == 9000


def test_a_head_that_does_not_fit_is_refused_before_the_server_starts(tmp_path, monkeypatch):
    pytest.importorskip("uvicorn", reason="needs the serve extra")
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    random_head(48, "residual").save_pretrained(tmp_path / "wide")
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(cli, ["serve", "--model", "model", "--head", "wide"])
    assert said.exit_code == 1 and "expects hidden size 48" in said.stderr
