"""Hostile requests: each is answered in time, with a reply or with an error of OpenAI's form, and harms nobody."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from hostile import BODIES, PROMPTS, chats
from serving import CHAT, post

pytest.importorskip("xgrammar", reason="needs the tools extra")

MOST_SECONDS = 20.0


async def answered(client, path, body: bytes, headers=(("content-type", "application/json"),)) -> int:
    """Send a body, check the form of the answer; its status."""
    began = time.monotonic()
    response = await asyncio.wait_for(client.post(path, content=body, headers=dict(headers)), MOST_SECONDS)
    shown = body[:300]
    assert response.status_code == 200 or 400 <= response.status_code < 500, (shown, response.text[:500])
    if response.status_code != 200:
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}, shown
        assert 0 < len(error["message"]) <= 500, shown
    elif response.headers["content-type"] == "application/json":
        assert response.json()["choices"], shown
    assert time.monotonic() - began < MOST_SECONDS
    return response.status_code


async def test_hostile_chats(client):
    before = await post(client, **CHAT)
    statuses = [await answered(client, "/v1/chat/completions", json.dumps(body).encode()) for body in chats()]
    assert len(statuses) > 400 and {200, 400, 404} <= set(statuses)
    assert (await post(client, **CHAT))["choices"] == before["choices"]


async def test_hostile_completions(client):
    bodies = [{"prompt": prompt, "max_tokens": 2, **more} for prompt in PROMPTS for more in ({}, {"stream": True})]
    bodies += [{"prompt": "x", "max_tokens": 2, "logprobs": value} for value in (-1, 0, 20, 21, True, "1", [])]
    statuses = [await answered(client, "/v1/completions", json.dumps(body).encode()) for body in bodies]
    assert {200, 400} <= set(statuses)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_hostile_bodies(client, path):
    assert {await answered(client, path, body) for body in BODIES} == {400}


async def test_hostile_paths_and_methods(client):
    for path in ("/", "/v1", "/v1/", "//v1/models", "/v1/models/", "/v1/models/..%2f..%2fetc", "/v1/../health", "/%00"):
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "NONSENSE"):
            response = await client.request(method, path)
            assert response.status_code < 500, (method, path)
