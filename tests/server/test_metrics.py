"""What the server tells of itself: metrics, health, models, its interface, and a line in the log for each request."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import CHAT, Caller, client_of, events, post, until

from mara_integrations.engine.decoder import Decoder
from mara_integrations.runtime import MARAEngine
from mara_integrations.server import create_app
from mara_integrations.testing import tiny_model, tiny_tokenizer


async def metrics(client) -> dict[str, float]:
    """Values by the names of samples with their labels."""
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = [sample for family in text_string_to_metric_families(response.text) for sample in family.samples]
    return {" ".join([sample.name, *sample.labels.values()]): sample.value for sample in samples}


async def test_requests_and_tokens_are_counted(client):
    usage = (await post(client, **CHAT))["usage"]
    await post(client, status=404, **{**CHAT, "model": "other"})
    await events(client, **CHAT)
    await client.get("/v1/models/other")
    await client.get("/nowhere")
    counted = await metrics(client)
    assert counted["mara_requests_total chat 200"] == 2
    assert counted["mara_requests_total chat 404"] == 1
    assert counted["mara_requests_total models 404"] == counted["mara_requests_total other 404"] == 1
    assert counted["mara_tokens_total prompt"] == 2 * usage["prompt_tokens"]
    assert counted["mara_tokens_total completion"] == 12


async def test_durations_are_counted(client):
    await post(client, **CHAT)
    await events(client, **CHAT)
    counted = await metrics(client)
    assert counted["mara_request_seconds_count chat"] == counted["mara_time_to_first_token_seconds_count"] == 2
    assert 0 < counted["mara_time_to_first_token_seconds_sum"] <= counted["mara_request_seconds_sum chat"]
    assert counted["mara_reply_tokens_count"] == 2 and counted["mara_reply_tokens_sum"] == 12


async def test_running_sequences_are_shown(app, client, engine):
    caller = Caller(app, {"prompt": ["once", "upon"], "max_tokens": 400}, "/v1/completions")
    call = asyncio.create_task(caller.call())
    await until(lambda: engine.status.num_live == 2)
    counted = await metrics(client)
    assert counted["mara_sequences_running"] == counted["mara_sequences_admitted"] == 2
    assert counted["mara_sequences_waiting"] == 0
    caller.leaves.set()
    await asyncio.wait_for(call, 20)
    await until(lambda: engine.status.num_live == 0)
    counted = await metrics(client)
    assert counted["mara_sequences_running"] == counted["mara_sequences_admitted"] == 0


async def test_two_applications_count_apart(app, client, engine):
    await post(client, **CHAT)
    async with client_of(create_app(engine, name="tiny")) as other:
        assert "mara_requests_total chat 200" not in await metrics(other)


async def test_each_request_is_a_line_in_the_log(client, caplog):
    with caplog.at_level(logging.INFO, "mara_integrations.server"):
        await post(client, **{**CHAT, "model": "tiny:brand"})
        await client.get("/%1b[2Jnowhere" + "x" * 1000)
    (first, second) = [record.getMessage() for record in caplog.records]
    assert "POST /v1/chat/completions 200" in first and "tiny:brand, 22 tokens in, 6 out" in first
    assert second.isprintable() and len(second) < 300 and " 404 " in second


@pytest.mark.parametrize("stream", [True, False])
async def test_tokens_of_a_reply_that_its_client_left_are_counted_and_logged(
    app, client, engine, caplog, monkeypatch, stream
):
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self: (time.sleep(0.005), step(self))[1])  # the client leaves in time
    caller = Caller(app, {**CHAT, "max_tokens": 400, "stream": stream})
    call = asyncio.create_task(caller.call())

    async def num_written():
        return (await metrics(client))["mara_tokens_total completion"]

    with caplog.at_level(logging.INFO, "mara_integrations.server.access"):
        if stream:
            await asyncio.wait_for(caller.heard.wait(), 20)
        for _ in range(2000):
            if await num_written():
                break
            await asyncio.sleep(0.001)
        caller.leaves.set()
        await asyncio.wait_for(call, 20)
    await until(lambda: engine.status.num_live == 0)

    line = next(message for message in caplog.messages if " 499 " in message)
    counted = await metrics(client)
    assert f"tiny, 22 tokens in, {counted['mara_tokens_total completion']:.0f} out" in line and " 0 out" not in line
    assert counted["mara_tokens_total prompt"] == 22 and counted["mara_reply_tokens_count"] == 0


async def test_health_is_told_also_before_the_model_is_loaded(engine):
    async with client_of(create_app(MARAEngine((tiny_model(), tiny_tokenizer())))) as client:
        response = await client.get("/health")
        assert (response.status_code, response.json()) == (200, {"status": "ok", "is_loaded": False})
    async with client_of(create_app(engine)) as client:
        assert (await client.get("/health")).json() == {"status": "ok", "is_loaded": True}


async def test_models_are_the_base_and_it_with_each_head(client):
    listed = (await client.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["tiny", "tiny:brand", "tiny:calm"]


async def test_a_model_is_described_by_its_name(engine, heads):
    async with client_of(create_app(engine, heads, name="org/tiny")) as client:
        for name in ("org/tiny", "org/tiny:brand"):
            assert (await client.get(f"/v1/models/{name}")).json()["id"] == name
        error = (await client.get("/v1/models/org/other")).json()["error"]
        assert error["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics"])
async def test_head_requests_have_no_body(client, path):
    response = await client.head(path)
    assert response.status_code == 200 and response.content == b""


async def test_the_interface_is_described(client):
    document = (await client.get("/openapi.json")).json()
    chat = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "tools", "temperature", "strength", "head"} <= chat.keys()
    assert set(document["paths"]) == {
        *("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{model}"),
        *("/health", "/metrics"),
    }
