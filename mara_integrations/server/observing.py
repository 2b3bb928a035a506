"""Log a line about each request, and count it in the metrics."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mara_integrations.server.errors import CLIENT_CLOSED, ClientClosedError, is_fault_of_server, refusal_of
from mara_integrations.server.metrics import Metrics

_log = logging.getLogger(__name__)
access_log = logging.getLogger("mara_integrations.server.access")

_ENDPOINTS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/models": "models",
    "/health": "health",
    "/metrics": "metrics",
    "/openapi.json": "openapi",
}
_SCOPE_KEY = "mara_integrations.observation"


@dataclass(slots=True)
class Observation:
    """The facts about one request that log and metrics report.

    Attributes:
        began_s: When it arrived, by `time.perf_counter`.
        status: HTTP status; None until the answer begins.
        model: The model that it names.
        prompt_tokens: Tokens of its prompts.
        completion_tokens: Tokens written so far.
        first_token_s: Seconds until its first token; None before.
    """

    began_s: float = field(default_factory=time.perf_counter)
    status: int | None = None
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None

    @classmethod
    def of(cls, scope: Scope) -> Observation:
        """Return the observation of the request with this scope."""
        found = scope.setdefault(_SCOPE_KEY, cls())
        assert isinstance(found, cls)
        return found


class Observer:
    """ASGI middleware that logs and counts each request.

    Args:
        app: The application.
        metrics: Counts requests.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; log and count it when it is answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        observation = Observation.of(scope)

        async def observed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                observation.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, observed_send)
        finally:
            self._tell(scope, observation)

    def _tell(self, scope: Scope, observation: Observation) -> None:
        seconds = time.perf_counter() - observation.began_s
        status = observation.status or CLIENT_CLOSED
        path = scope["path"]
        endpoint = _ENDPOINTS.get(path, "models" if path.startswith("/v1/models/") else "other")
        self._metrics.count_request(endpoint, status, seconds)
        client = scope["client"][0] if scope.get("client") else "-"
        tokens = (
            f", {observation.prompt_tokens} tokens in, {observation.completion_tokens} out" if observation.model else ""
        )
        model = f" {_printable(observation.model)}" if observation.model else ""
        line = f"{client} {scope['method']} {_printable(path)} {status} {seconds:.2f} s{model}{tokens}"
        access_log.info("%s", line)


class ErrorAnswers:
    """ASGI middleware that turns errors into answers of OpenAI's form.

    An error after the answer has begun ends the connection instead.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and answer the error that it raises."""
        has_begun = False

        async def noting_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = has_begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except Exception as error:
            if scope["type"] != "http":
                raise
            if is_fault_of_server(error):
                _log.exception("%s %s failed", scope["method"], _printable(scope["path"]))
            refusal = refusal_of(error)
            if has_begun:
                Observation.of(scope).status = refusal.status
                if not isinstance(error, ClientClosedError):
                    raise
                return
            answer = JSONResponse(refusal.as_dict(), status_code=refusal.status, headers=refusal.headers)
            await answer(scope, receive, send)


def _printable(text: str, num_chars: int = 200) -> str:
    """Return a text of a client for a line of a log: no control characters, and not too long."""
    shortened = text if len(text) <= num_chars else f"{text[:num_chars]}..."
    return shortened if shortened.isprintable() else repr(shortened)[1:-1]
