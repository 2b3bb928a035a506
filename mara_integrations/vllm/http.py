"""ASGI middleware for `vllm serve`: heads named as `{"mara": {"head": ..., "strength": ...}}` in a request's body.

vLLM ignores what it does not know of a body, and hands `vllm_xargs` on, whose values can't be objects. With
`--middleware mara_integrations.vllm.http.MaraBody` the one becomes the other.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class MaraBody:
    """Moves `mara` of a JSON body into its `vllm_xargs`; all other requests pass as they are.

    Args:
        app: The ASGI application.
    """

    def __init__(self, app: Callable[[_Message, _Receive, _Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Handle a connection."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        moved = _moved(body)
        if moved is not None:
            headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
            scope = {**scope, "headers": [*headers, (b"content-length", b"%d" % len(moved))]}
            messages = [{"type": "http.request", "body": moved}]
        left = iter(messages)

        async def replay() -> _Message:
            return next(left, None) or await receive()

        await self._app(scope, replay, send)


def _moved(body: bytes) -> bytes | None:
    """Return a body with `mara` in `vllm_xargs`; None where there is nothing to move."""
    if b'"mara"' not in body:
        return None
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None  # vLLM says what is wrong with it
    if not isinstance(request, dict) or "mara" not in request or not isinstance(request.get("vllm_xargs") or {}, dict):
        return None
    asked = request.pop("mara")
    flat = {"mara": json.dumps(asked)}  # not allowed, and refused by name
    if isinstance(asked, dict):
        head = asked.get("head")
        if isinstance(head, dict):
            asked = {**asked, "head": list(head), "weights": list(head.values())}
        flat = {f"mara_{name}": value for name, value in asked.items()}
    return json.dumps({**request, "vllm_xargs": {**(request.get("vllm_xargs") or {}), **flat}}).encode()
