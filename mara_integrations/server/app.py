"""The server: routes, errors in OpenAI's shape, streams that stop when nobody listens, counts."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from typing import Any, TypeVar

from mara_integrations.errors import MaraError, MissingExtraError
from mara_integrations.runtime import MARAEngine
from mara_integrations.server.answers import ChatAnswer, CompletionAnswer, usage
from mara_integrations.server.requests import Asked, UnknownModelError, read_request

try:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException  # fastapi's own is not raised for unknown routes
except ImportError as error:
    raise MissingExtraError("the server needs fastapi", hint="pip install 'mara-integrations[serve]'") from error

_Result = TypeVar("_Result")
_GONE = 499  # as nginx has it: the client closed the connection
_MAX_RUNNING = 256  # four full batches: a client that has to wait longer had better ask elsewhere


class _GoneError(Exception):
    """Nobody waits for the answer any more."""


def create_app(
    engine: MARAEngine,
    heads: Mapping[str, str] | None = None,
    *,
    name: str | None = None,
    api_key: str | None = None,
    max_running: int = _MAX_RUNNING,
) -> FastAPI:
    """The application, for uvicorn or any other ASGI server.

    Args:
        engine: Loaded on the first request, if it is not yet. Its own head is not used: a request names one of `heads`,
            or none.
        heads: Heads by the names that requests use.
        name: Of the base model, as requests use it; None takes what the engine was given.
        api_key: Without it in the `Authorization` header, requests are refused; None asks for none.
        max_running: Requests answered or waiting at once; more are refused with status 503.

    Raises:
        MissingExtraError: On import, if fastapi is not installed.
    """
    if name is None:
        name = engine.spec.model if isinstance(engine.spec.model, str) else "model"
    served = _Served(engine, dict(heads or {}), name, api_key, max_running)
    app = FastAPI(title="mara_integrations", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(HTTPException, _no_such_route)
    app.add_api_route("/v1/chat/completions", served.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", served.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", served.models, methods=["GET"], response_model=None)
    app.add_api_route("/health", served.health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", served.metrics, methods=["GET"], response_model=None)
    return app


class _Served:
    """What the routes share."""

    def __init__(
        self, engine: MARAEngine, heads: dict[str, str], name: str, api_key: str | None, max_running: int
    ) -> None:
        self.engine, self.heads, self.name = engine, heads, name
        self._api_key = api_key
        self._max_running = max_running
        self._requests: Counter[tuple[str, int]] = Counter()
        self._tokens: Counter[str] = Counter()
        self._running = 0

    # --- routes ---

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        return await self._answered(request, "chat", ChatAnswer)

    async def complete(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        return await self._answered(request, "completions", CompletionAnswer)

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`: the base model, and it with each head."""
        if not self._may(request):
            return _refusal(401, "the API key is missing or wrong", code="invalid_api_key")
        names = [self.name, *(f"{self.name}:{head}" for head in self.heads)]
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "mara_integrations"} for name in names]
        return JSONResponse({"object": "list", "data": data})

    async def health(self) -> Response:
        """`GET /health`, also while the model is loading."""
        return JSONResponse({"status": "ok", "is_loaded": self.engine.is_loaded})

    async def metrics(self) -> Response:
        """`GET /metrics`, as Prometheus reads it."""
        lines = ["# TYPE mara_requests_total counter"]
        lines += [
            f'mara_requests_total{{endpoint="{endpoint}",status="{status}"}} {count}'
            for (endpoint, status), count in sorted(self._requests.items())
        ]
        lines.append("# TYPE mara_tokens_total counter")
        lines += [f'mara_tokens_total{{kind="{kind}"}} {self._tokens[kind]}' for kind in ("prompt", "completion")]
        lines += ["# TYPE mara_requests_running gauge", f"mara_requests_running {self._running}"]
        return PlainTextResponse("\n".join(lines) + "\n")

    # --- one request ---

    async def _answered(
        self, request: Request, endpoint: str, kind: type[ChatAnswer] | type[CompletionAnswer]
    ) -> Response:
        try:
            response = await self._answer(request, endpoint, kind)
        except _GoneError:
            response = _refusal(_GONE, "the client is gone")
        except UnknownModelError as error:
            response = _refusal(404, str(error), code="model_not_found", param="model")
        except MaraError as error:
            response = _refusal(400, str(error))
        if not isinstance(response, StreamingResponse):  # a stream counts itself when it ends
            self._requests[endpoint, response.status_code] += 1
        return response

    async def _answer(
        self, request: Request, endpoint: str, kind: type[ChatAnswer] | type[CompletionAnswer]
    ) -> Response:
        if not self._may(request):
            return _refusal(401, "the API key is missing or wrong", code="invalid_api_key")
        if self._running >= self._max_running:
            return _refusal(503, f"{self._running} requests are running already: try again later", code="overloaded")
        try:
            body = await request.json()
        except ValueError as error:
            return _refusal(400, f"the body is no JSON: {error}")
        asked = read_request(body, self.name, self.heads, is_chat=kind is ChatAnswer)
        if asked.is_stream:
            await asyncio.to_thread(self.engine.request, asked.prompts[0], **asked.settings)  # refuse with a status
            answer = kind(asked, self.engine.model)
            return StreamingResponse(self._events(asked, answer, endpoint), media_type="text/event-stream")
        generating = [self.engine.agenerate(prompt, **asked.settings) for prompt in asked.prompts]
        self._running += 1
        try:
            generations = await _while_listening(request, asyncio.gather(*generating))
        finally:
            self._running -= 1
        self._count(usage(generations))
        return JSONResponse(kind(asked, self.engine.model).whole(generations))

    async def _events(self, asked: Asked, answer: ChatAnswer | CompletionAnswer, endpoint: str) -> AsyncIterator[str]:
        """Server-sent events. The web server closes this when the client is gone, which stops the generation."""
        updates = self.engine.astream(asked.prompts[0], **asked.settings)
        self._running += 1
        status, is_first = _GONE, True
        try:
            async for update in updates:
                for part in answer.parts(update, is_first):
                    yield _event(part)
                is_first = False
                if update.generation is not None:
                    self._count(usage([update.generation]))
            yield "data: [DONE]\n\n"
            status = 200
        except Exception as error:  # the status is sent already, so this is the only way to say it
            status = 500
            yield _event(_error(str(error), "server_error"))
        finally:
            await updates.aclose()
            self._running -= 1
            self._requests[endpoint, status] += 1

    def _may(self, request: Request) -> bool:
        if self._api_key is None:
            return True
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode(), self._api_key.encode())

    def _count(self, counts: Mapping[str, int]) -> None:
        self._tokens["prompt"] += counts["prompt_tokens"]
        self._tokens["completion"] += counts["completion_tokens"]


async def _while_listening(request: Request, work: asyncio.Future[_Result]) -> _Result:
    """What the work gives, unless the client leaves first, which cancels it."""

    async def leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    left = asyncio.ensure_future(leaves())
    either: set[asyncio.Future[Any]] = {work, left}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise _GoneError
        return work.result()
    finally:
        left.cancel()
        work.cancel()


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}")


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _refusal(status: int, message: str, *, param: str | None = None, code: str | None = None) -> Response:
    kind = {401: "authentication_error", 503: "server_error"}.get(status, "invalid_request_error")
    return JSONResponse(_error(message, kind, param, code), status_code=status)
