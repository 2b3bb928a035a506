"""What the server's tests share: a client's calls, and a server on a real port."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import contextmanager
from typing import Any

import httpx

USER = {"role": "user", "content": "hi"}
CHAT = {"model": "tiny", "messages": [USER], "max_tokens": 6}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def client_of(app) -> httpx.AsyncClient:
    """A client that calls an application in this event loop."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://mara")


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


class Caller:
    """A client at the other end of an ASGI application, who leaves when it likes."""

    def __init__(self, app, body, path="/v1/chat/completions"):
        self.app, self.body, self.path = app, json.dumps(body).encode(), path
        self.has_sent, self.leaves = False, asyncio.Event()
        self.heard = asyncio.Event()
        self.status = None

    async def call(self):
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "query_string": b"",
            "path": self.path,
            "headers": [(b"content-type", b"application/json")],
        }
        await self.app(scope, self.receive, self.send)

    async def receive(self):
        if not self.has_sent:
            self.has_sent = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
        if message["type"] == "http.response.body" and message.get("body"):
            self.heard.set()


async def until(condition, seconds=20.0):
    for _ in range(int(seconds * 1000)):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise TimeoutError


@contextmanager
def serving(app, **settings):
    """Serve an application on a free port of this machine, in a thread; gives the port."""
    from mara_integrations.server.listening import Server, bind, port_of

    sockets = bind("127.0.0.1", 0)
    port = port_of(sockets)
    server = Server(app, **settings)
    thread = threading.Thread(target=server.run, args=(sockets,))
    thread.start()
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
