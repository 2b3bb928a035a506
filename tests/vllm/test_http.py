"""A body that names heads as an object reaches vLLM in the flat form that it hands on."""

from __future__ import annotations

import json

import pytest

from mara_integrations.vllm.http import MaraBody


async def passed(body, method="POST", chunk=16):
    """What the application reads of a body that comes in pieces: its bytes and the length that the headers say."""
    parts = [body[start : start + chunk] for start in range(0, len(body), chunk)] or [b""]
    incoming = iter(
        {"type": "http.request", "body": part, "more_body": i < len(parts) - 1} for i, part in enumerate(parts)
    )
    read = []

    async def app(scope, receive, send):
        more = True
        while more:
            message = await receive()
            read.append(message["body"])
            more = message.get("more_body", False)
        read.append(dict(scope["headers"]).get(b"content-length"))

    async def receive():
        return next(incoming)

    scope = {"type": "http", "method": method, "headers": [(b"content-length", b"%d" % len(body))]}
    await MaraBody(app)(scope, receive, None)
    *content, length = read
    return b"".join(content), int(length)


@pytest.mark.parametrize(
    ("mara", "flat"),
    [
        ({"head": "brand", "strength": 0.8}, {"mara_head": "brand", "mara_strength": 0.8}),
        ({"head": ["a", "b"], "weights": [1, 0.5]}, {"mara_head": ["a", "b"], "mara_weights": [1, 0.5]}),
        ({"head": {"a": 1, "b": 0.5}}, {"mara_head": ["a", "b"], "mara_weights": [1, 0.5]}),
        ("brand", {"mara": '"brand"'}),
    ],
)
async def test_mara_becomes_arguments_that_vllm_hands_on(mara, flat):
    request = {"model": "m", "messages": [], "vllm_xargs": {"other": 1}}
    content, length = await passed(json.dumps({**request, "mara": mara}).encode())
    assert json.loads(content) == {**request, "vllm_xargs": {"other": 1, **flat}}
    assert length == len(content)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "m"}',
        b'["mara"]',
        b'{"text": "\\"mara\\""}',
        b'{"mara": 1, "vllm_xargs": 3}',
        pytest.param(b'{"mara": %s%s}' % (b"[" * 100_000, b"]" * 100_000), id="too deep"),
    ],
)
async def test_other_bodies_pass_as_they_are(body):
    assert await passed(body) == (body, len(body))
    assert await passed(b'{"mara": {}}', method="PUT") == (b'{"mara": {}}', 12)
