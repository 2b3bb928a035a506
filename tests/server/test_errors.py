"""Errors: which status each has, always in the form of OpenAI's API, and what they must not tell."""

from __future__ import annotations

import json

import httpx
import pytest
from serving import CHAT, USER, client_of, post

from mara_integrations.errors import (
    ConfigError,
    ContextLengthError,
    EngineClosedError,
    HeadError,
    MissingExtraError,
    ModelError,
)
from mara_integrations.runtime import MARAEngine
from mara_integrations.server import create_app
from mara_integrations.server.errors import RefusalError, refusal_of, shown
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (ConfigError("top_k=0 is not allowed"), 400, "invalid_request_error", None),
        (ContextLengthError("too long"), 400, "invalid_request_error", "context_length_exceeded"),
        (MissingExtraError("tools need xgrammar"), 400, "invalid_request_error", None),
        (EngineClosedError("closed"), 503, "server_error", "engine_closed"),
        (HeadError("head '/srv/heads/x' is damaged"), 500, "server_error", "head_error"),
        (ModelError("model '/srv/model' failed"), 500, "server_error", "model_error"),
        (RuntimeError("CUDA out of memory in /srv/model"), 500, "server_error", "internal_error"),
    ],
)
def test_each_class_of_error_has_its_status(error, status, kind, code):
    refusal = refusal_of(error)
    told = refusal.as_dict()["error"]
    assert (refusal.status, told["type"], told["code"]) == (status, kind, code)
    assert "/srv" not in told["message"]


def test_who_may_try_again_is_told_when():
    assert refusal_of(EngineClosedError("closed")).headers["retry-after"].isdecimal()
    assert "retry-after" not in refusal_of(RuntimeError("broken")).headers


def test_long_messages_are_cut_in_the_middle():
    message = RefusalError(400, "begin " + "x" * 10_000 + " end").message
    assert len(message) <= 500 and message.startswith("begin") and message.endswith("end")


def test_values_are_shown_short():
    for value in ("x" * 10_000, 10**10_000, [10**10_000], list(range(10_000)), {"a": "x" * 10_000}):
        assert len(shown(value)) <= 62


async def test_an_unknown_route_is_answered_with_those_that_are_there(client):
    said = (await post(client, "embeddings", status=404))["error"]["message"]
    assert said.startswith("POST '/v1/embeddings': Not Found (hint: this server has /v1/chat/completions, ")
    assert "error" in (await client.get("/")).json()


async def test_another_method_is_not_allowed(client):
    response = await client.get("/v1/chat/completions")
    assert response.status_code == 405 and response.headers["allow"] == "POST"
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 3000}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 600}], "stream": True}),
        ("completions", {"prompt": "x" * 3000}),
        ("completions", {"prompt": ["once", "x" * 600]}),
        ("completions", {"prompt": [70] * 600}),
    ],
)
async def test_a_prompt_too_long_says_so_in_the_words_that_clients_look_for(client, path, body):
    error = (await post(client, path, status=400, **body))["error"]
    assert error["code"] == "context_length_exceeded"
    assert "this model's maximum context length is 512 tokens" in error["message"]


async def test_a_setting_that_only_the_engine_can_judge_is_the_requests_fault(client, engine, tmp_path):
    random_head(32, "paper").save_pretrained(tmp_path / "paper")
    app = create_app(engine, {"paper": str(tmp_path / "paper")}, name="tiny")
    async with client_of(app) as client:
        error = (await post(client, status=400, **CHAT, head="paper", strength=0.5))["error"]
        assert "strength=0.5 is not allowed" in error["message"] and str(tmp_path) not in error["message"]


async def test_token_ids_outside_the_vocabulary_are_the_requests_fault_and_tell_no_path(tmp_path):
    folder = tmp_path / "secret-place" / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    async with client_of(create_app(MARAEngine(str(folder)))) as client:
        error = (await post(client, "completions", status=400, prompt=[300]))["error"]
        assert "token id 300 is not in the vocabulary of 'model'" in error["message"]
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "model"


async def test_a_conversation_that_the_chat_template_refuses_is_the_requests_fault():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no user message') }}"
    async with client_of(create_app(MARAEngine((tiny_model(), tokenizer)), name="tiny")) as client:
        error = (await post(client, status=400, **CHAT))["error"]
        assert "chat template" in error["message"] and "no user message" in error["message"]


async def test_a_head_that_is_damaged_is_the_servers_fault(engine, heads, folder, tmp_path, caplog):
    place = tmp_path / "heads" / "broken"
    random_head(32, "residual").save_pretrained(place)
    (place / "head_config.json").write_text("{")
    app = create_app(engine, {**heads, "broken": str(place)}, name="tiny")
    async with client_of(app) as client:
        error = (await post(client, status=500, **CHAT, head="broken"))["error"]
        assert error["code"] == "head_error" and str(tmp_path) not in error["message"]
        await post(client, **CHAT, head="brand")
    assert str(place) in caplog.text


async def test_a_model_that_can_not_be_loaded_is_the_servers_fault():
    async with client_of(create_app(MARAEngine("no-such-model"))) as client:
        error = (await post(client, status=500, messages=[USER]))["error"]
        assert error["code"] == "model_error"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_that_fails_is_a_counted_500_of_openais_form(stream):
    engine = engine_that_fails(after=0)
    async with client_of(create_app(engine, name="tiny")) as client:
        error = (await post(client, status=500, **CHAT, stream=stream))["error"]
        assert error["type"] == "server_error" and "no memory left" not in error["message"]
        assert 'mara_requests_total{endpoint="chat",status="500"} 1.0' in (await client.get("/metrics")).text


async def test_health_tells_of_a_model_that_fails_again_and_again():
    async with client_of(create_app(engine_that_fails(after=0), name="tiny")) as client:
        assert (await client.get("/health")).status_code == 200
        for _ in range(8):
            await post(client, status=500, **CHAT)
        health = await client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "failed", "is_loaded": True})


async def test_a_failure_after_the_first_token_is_told_in_the_stream():
    engine = engine_that_fails(after=4)
    async with client_of(create_app(engine, name="tiny")) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 200, "stream": True})
        assert response.status_code == 200
        last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
        assert last["error"]["type"] == "server_error"
        assert 'mara_requests_total{endpoint="chat",status="500"} 1.0' in (await client.get("/metrics")).text


async def test_a_closed_engine_is_a_503_to_try_again():
    engine = MARAEngine((tiny_model(), tiny_tokenizer())).load()
    engine.close()
    async with client_of(create_app(engine, name="tiny")) as client:
        response: httpx.Response = await client.post("/v1/chat/completions", json=CHAT)
        assert response.status_code == 503 and "retry-after" in response.headers
        assert response.json()["error"]["code"] == "engine_closed"
        health = await client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")


def engine_that_fails(after):
    """An engine whose model fails at one of its next forwards, and ever after."""
    engine = MARAEngine(
        (tiny_model("gpt2"), tiny_tokenizer())
    ).load()  # not copied, as a llama is: its layers are called
    engine.generate("warm", max_new_tokens=1)
    count = 0

    def hook(*_):
        nonlocal count
        count += 1
        if count > after:
            raise RuntimeError("no memory left")

    engine.model.model.get_input_embeddings().register_forward_pre_hook(hook)
    return engine


def test_a_head_that_is_not_there_is_refused_when_the_server_is_made(engine, tmp_path, monkeypatch):
    """Not request by request, when a missing folder could be taken for somebody's repository on the Hub."""
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **_: asked.append(args))
    with pytest.raises(HeadError, match="no head at"):
        create_app(engine, {"brand": str(tmp_path / "nowhere")})
    assert asked == []
