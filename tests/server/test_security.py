"""Who may send requests: keys as the standards say, and no web pages unless they are allowed."""

from __future__ import annotations

import pytest
from serving import CHAT, client_of, post

from mara_integrations.errors import ConfigError
from mara_integrations.server import create_app

JSON = {"content-type": "application/json"}
PREFLIGHT = {
    "origin": "https://chat.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type, x-stainless-lang",
}


async def asked(app, method="POST", path="/v1/chat/completions", *, server=None, headers=(), body=b"{}"):
    """Status and headers of the answer to a request with these headers, on a connection to `server`."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    raw = [
        (name.encode(), value if isinstance(value, bytes) else value.encode()) for name, value in dict(headers).items()
    ]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "query_string": b""}
    await app({**scope, "path": path, "headers": raw, "server": server, "client": ("10.0.0.1", 5)}, receive, send)
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


# --- keys


async def test_with_a_key_only_those_who_send_it_are_served(engine):
    async with client_of(create_app(engine, name="tiny", api_key="secret")) as client:
        for path in ("/v1/models", "/v1/models/tiny", "/metrics", "/nowhere"):
            response = await client.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 401
        client.headers["authorization"] = "Bearer secret"
        await post(client, **CHAT)
        assert (await client.get("/metrics")).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/openapi.json"])
async def test_health_and_the_interfaces_description_need_no_key(engine, path):
    async with client_of(create_app(engine, name="tiny", api_key="secret")) as client:
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer secret", 200),
        ("bearer secret", 200),
        ("BEARER  secret", 200),
        ("secret", 401),
        ("Bearersecret", 401),
        ("Basic secret", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer Secret", 401),
        ("Bearer secret x", 401),
        ("", 401),
    ],
)
async def test_the_scheme_is_bearer_in_any_case_and_the_key_is_exact(engine, header, status):
    app = create_app(engine, name="tiny", api_key="secret")
    assert (await asked(app, "GET", "/v1/models", headers={"authorization": header}))[0] == status


async def test_a_key_beyond_ascii_is_compared_by_its_bytes(engine):
    app = create_app(engine, name="tiny", api_key="schlüssel")
    for value, status in (("Bearer schlüssel".encode(), 200), (b"Bearer schl\xfcssel", 401), (b"Bearer \xff", 401)):
        assert (await asked(app, "GET", "/v1/models", headers={"authorization": value}))[0] == status


@pytest.mark.parametrize("key", ["", "  ", "two words", "line\n"])
def test_a_key_that_no_client_can_send_is_refused_at_the_start(engine, key):
    with pytest.raises(ConfigError, match="the API key"):
        create_app(engine, api_key=key)


# --- web pages


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:8000"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
async def test_a_web_page_is_refused(app, origin, method):
    headers = {**JSON, "origin": origin}
    path = "/v1/models" if method == "GET" else "/v1/chat/completions"
    status, answer = await asked(app, method, path, headers=headers)
    assert status == 403 and "access-control-allow-origin" not in answer


async def test_an_allowed_page_is_answered_and_may_read_errors_too(engine):
    app = create_app(engine, name="tiny", allow_origins=["https://chat.example"])
    async with client_of(app) as client:
        client.headers["origin"] = "https://chat.example"
        for response in (
            await client.post("/v1/chat/completions", json=CHAT),
            await client.post("/v1/chat/completions", json={}),
            await client.get("/nowhere"),
        ):
            assert response.headers["access-control-allow-origin"] == "https://chat.example"
        client.headers["origin"] = "https://evil.example"
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 403


async def test_the_preflight_of_an_allowed_page_needs_no_key(engine):
    app = create_app(engine, name="tiny", api_key="secret", allow_origins=["https://chat.example"])
    status, answer = await asked(app, "OPTIONS", headers=PREFLIGHT)
    assert status == 200
    assert answer["access-control-allow-origin"] == "https://chat.example"
    assert "POST" in answer["access-control-allow-methods"]
    assert "x-stainless-lang" in answer["access-control-allow-headers"]
    assert (await asked(app, "OPTIONS", headers={**PREFLIGHT, "origin": "https://evil.example"}))[0] == 403


async def test_all_pages_may_be_allowed(engine):
    app = create_app(engine, name="tiny", allow_origins=["*"])
    assert (await asked(app, "GET", "/v1/models", headers={"origin": "https://any.example"}))[0] == 200


@pytest.mark.parametrize(
    ("server", "host", "status"),
    [
        (("127.0.0.1", 8000), "127.0.0.1:8000", 200),
        (("127.0.0.1", 8000), "LOCALHOST:8000", 200),
        (("127.0.0.1", 8000), "127.1.2.3", 200),
        (("127.0.0.1", 8000), "evil.example", 403),
        (("127.0.0.1", 8000), "evil.example:8000", 403),
        (("127.0.0.1", 8000), "localhost.evil.example", 403),
        (("127.0.0.1", 8000), "127.0.0.1.evil.example", 403),
        (("127.0.0.1", 8000), "", 403),
        (("::1", 8000), "[::1]:8000", 200),
        (("::1", 8000), "[::1]", 200),
        (("::ffff:127.0.0.1", 8000), "evil.example", 403),
        (("192.168.1.5", 8000), "gpu-box.local:8000", 200),
        (None, "anything", 200),
    ],
)
async def test_a_connection_to_this_machine_has_to_name_this_machine(app, server, host, status):
    assert (await asked(app, "GET", "/v1/models", server=server, headers={"host": host}))[0] == status


async def test_other_hosts_may_be_allowed(engine):
    app = create_app(engine, name="tiny", allow_hosts=["llm.example"])
    local = ("127.0.0.1", 8000)
    assert (await asked(app, "GET", "/v1/models", server=local, headers={"host": "LLM.example"}))[0] == 200
    assert (await asked(app, "GET", "/v1/models", server=local, headers={"host": "evil.example"}))[0] == 403


async def test_who_knows_the_key_may_name_any_host(engine):
    app = create_app(engine, name="tiny", api_key="secret")
    headers = {"host": "llm.example", "authorization": "Bearer secret"}
    assert (await asked(app, "GET", "/v1/models", server=("127.0.0.1", 80), headers=headers))[0] == 200


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json"])
async def test_a_body_that_is_not_declared_as_json_is_refused(app, kind):
    assert (await asked(app, headers={"content-type": kind}))[0] == 415
    assert (await asked(app))[0] == 415


async def test_a_charset_may_be_declared_too(app):
    assert (await asked(app, headers={"content-type": "Application/JSON; charset=utf-8"}))[0] == 400  # "{}" is read


async def test_a_compressed_body_is_refused(app):
    assert (await asked(app, headers={**JSON, "content-encoding": "gzip"}))[0] == 415


async def test_a_body_of_two_lengths_is_refused(app):
    status, answer = await asked(app, headers={**JSON, "content-length": "2", "transfer-encoding": "chunked"})
    assert status == 400 and answer["connection"] == "close"
