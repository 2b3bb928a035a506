"""Decide who may send requests: API keys, and checks that keep web pages away from a server on this machine."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mara_integrations.errors import ConfigError
from mara_integrations.server.errors import RefusalError, shown

# Paths that need no key: load balancers ask for the first, tools for the second, and neither tells anything secret.
OPEN_PATHS = frozenset({"/health", "/openapi.json"})


def check_api_key(api_key: str | None) -> None:
    """Refuse a key that no client could send.

    Raises:
        ConfigError: If the key is empty or holds white space or control characters.
    """
    if api_key is not None and not re.fullmatch(r"[^\s\x00-\x20\x7f]+", api_key):
        problem = "is empty" if not api_key.strip() else "holds white space or control characters"
        raise ConfigError(f"the API key {problem}", hint="give a key, or none to serve without one")


class BrowserGuard:
    """ASGI middleware that keeps out requests that a web page may have made its visitor's browser send.

    A request with an `Origin` header comes from a page, and is refused unless that origin is allowed. A connection to a
    loopback address has to name a loopback host, since a page may let its own host name point to it (DNS rebinding);
    where a key is needed this is not checked, because the page does not know it.

    Args:
        app: The application.
        allow_origins: Origins of web pages that may send requests; `*` allows all.
        allow_hosts: Host names that a connection to a loopback address may name, beside the loopback ones; `*` allows
            all.
    """

    def __init__(self, app: ASGIApp, *, allow_origins: Sequence[str] = (), allow_hosts: Sequence[str] = ()) -> None:
        self._app = app
        self._origins = frozenset(allow_origins)
        self._hosts = frozenset(host.lower() for host in allow_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, then pass it on."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            self._check_framing(headers)
            self._check_origin(headers)
            self._check_host(scope, headers)
        await self._app(scope, receive, send)

    def _check_framing(self, headers: Headers) -> None:
        if "content-length" in headers and "transfer-encoding" in headers:
            # two lengths of one body: a proxy may take the other one, and see requests where we see a body
            problem = "the request has both Content-Length and Transfer-Encoding"
            raise RefusalError(400, problem, headers={"connection": "close"})

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is not None and not {"*", origin} & self._origins:
            problem = f"web pages of {shown(origin)} may not send requests here (hint: mara-tools serve --allow-origin)"
            raise RefusalError(403, problem, code="origin_not_allowed")

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        server = scope.get("server")
        if server is None or not _is_loopback(server[0]) or "*" in self._hosts:
            return
        host = headers.get("host", "")
        name = re.sub(r":\d*$", "", host).strip("[]").rstrip(".").lower()
        if name not in {"localhost", *self._hosts} and not _is_loopback(name):
            problem = f"this server does not answer for the host {shown(host)} (hint: mara-tools serve --allow-host)"
            raise RefusalError(403, problem, code="host_not_allowed")


class KeyGuard:
    """ASGI middleware that asks for the API key, and for bodies that are declared as JSON.

    A web page can send a body of another type without asking first (CORS preflight), so no other type is read.

    Args:
        app: The application.
        api_key: The key that requests have to bring as `Authorization: Bearer KEY`; None asks for none.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None = None) -> None:
        self._app = app
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, then pass it on."""
        if scope["type"] == "http":
            if self._api_key is not None and scope["path"] not in OPEN_PATHS:
                self._check_key(scope, self._api_key)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                self._check_content_type(Headers(scope=scope))
        await self._app(scope, receive, send)

    def _check_key(self, scope: Scope, expected: bytes) -> None:
        given = b"".join(value for name, value in scope["headers"] if name == b"authorization")
        scheme, _, key = given.partition(b" ")
        is_right = hmac.compare_digest(key.strip(b" "), expected)
        if not is_right or scheme.lower() != b"bearer":
            problem = "the API key is missing or wrong (hint: send the header Authorization: Bearer KEY)"
            raise RefusalError(401, problem, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _check_content_type(self, headers: Headers) -> None:
        given = headers.get("content-type", "")
        kind = given.partition(";")[0].strip().lower()
        if kind != "application/json":
            problem = f"the content type is {shown(given)}; a body has to be application/json"
            raise RefusalError(415, problem, code="unsupported_content_type")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise RefusalError(415, "compressed bodies are not supported", code="unsupported_content_encoding")


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
