"""The server as an ASGI application: its routes, and the order in which a request passes the checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from mara_integrations.engine.limits import EngineLimits
from mara_integrations.errors import ConfigError, MissingExtraError
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.source import OneHead
from mara_integrations.heads.source import heads as heads_in_memory
from mara_integrations.runtime import MARAEngine

try:
    import prometheus_client  # noqa: F401  # so that all that is missing is named in one place
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise MissingExtraError(f"the server needs {error.name}", hint="pip install 'mara-integrations[serve]'") from error

from mara_integrations.server.answers import ChatAnswer, CompletionAnswer
from mara_integrations.server.errors import RefusalError, shown
from mara_integrations.server.generation import GenerationEndpoint
from mara_integrations.server.limits import Admission, ServerLimits
from mara_integrations.server.metrics import Metrics
from mara_integrations.server.names import ServedNames, model_name
from mara_integrations.server.objects import Health, ModelObject
from mara_integrations.server.observing import ErrorAnswers, Observer
from mara_integrations.server.openapi import openapi
from mara_integrations.server.requests import read_chat, read_completion, unknown_model
from mara_integrations.server.security import BrowserGuard, KeyGuard, check_api_key


def create_app(
    engine: MARAEngine,
    heads: Mapping[str, OneHead] | None = None,
    *,
    name: str | None = None,
    api_key: str | None = None,
    max_running: int = 256,
    max_body_bytes: int = 4 << 20,
    body_timeout_s: float = 30.0,
    allow_origins: Sequence[str] = (),
    allow_hosts: Sequence[str] = (),
) -> Starlette:
    """Return the application, for uvicorn or any other ASGI server.

    Args:
        engine: Loaded on the first request, if it is not yet. Its `limits` bound batch and memory. Its own head is not
            used: a request names one of `heads`, or none.
        heads: Heads by the names that requests use.
        name: Name of the base model, as requests use it; None takes the name that the engine was given, of a file or
            folder its last part.
        api_key: Requests need the header `Authorization: Bearer KEY`, except those to `/health` and `/openapi.json`;
            None serves everybody.
        max_running: Sequences answered or waiting at once, at most the engine's `max_waiting`; each prompt of a request
            is one. More are refused with status 503.
        max_body_bytes: Largest body of a request; a larger one is refused with status 413.
        body_timeout_s: Seconds in which a body has to arrive; a slower one is refused with status 408.
        allow_origins: Origins of web pages that may send requests, as `https://chat.example`; `*` allows all.
        allow_hosts: Host names that requests to a loopback address may name beside the loopback ones, as behind a
            proxy; `*` allows all. With an API key all are allowed.

    Raises:
        ConfigError: If an argument has a value that is not allowed.
        HeadError: If one of `heads` is not there. Whether a name is a path or a Hub id is decided here, once.
        MissingExtraError: On import, if the extra `serve` is not installed.
    """
    check_api_key(api_key)
    limits = ServerLimits.of(max_running=max_running, max_body_bytes=max_body_bytes, body_timeout_s=body_timeout_s)
    max_waiting = (engine.limits or EngineLimits()).max_waiting
    if max_running > max_waiting:  # whoever submits more to the engine waits in a thread, of which there are few
        raise ConfigError(
            f"max_running={max_running!r} is more than the engine's max_waiting={max_waiting!r}",
            hint="give the engine limits=EngineLimits(max_waiting=...)",
        )
    for source in (heads or {}).values():
        if not isinstance(source, MARAHead):
            heads_in_memory.locate(source)
    names = ServedNames(model_name(engine.spec.model) if name is None else name, dict(heads or {}))
    admission = Admission(max_running)
    metrics = Metrics(lambda: admission.num_running, lambda: engine.status)
    routes = _Routes(engine, names, metrics, has_key=api_key is not None)
    endpoint = partial(
        GenerationEndpoint,
        engine,
        admission,
        metrics,
        names,
        limits,
    )
    origins, cors = list(allow_origins), []
    if origins:
        cors = [Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])]
    # From the outside in. Answers to errors get the CORS headers too, so that an allowed page can read them.
    middleware = [
        Middleware(Observer, metrics=metrics),
        Middleware(ErrorAnswers),
        Middleware(BrowserGuard, allow_origins=origins, allow_hosts=["*"] if api_key else list(allow_hosts)),
        *cors,
        Middleware(ErrorAnswers),
        Middleware(KeyGuard, api_key=api_key),
    ]
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", endpoint(read_chat, ChatAnswer), methods=["POST"]),
            Route("/v1/completions", endpoint(read_completion, CompletionAnswer), methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{model:path}", routes.model),
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
            Route("/openapi.json", routes.openapi),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _no_such_route},
    )
    app.state.admission, app.state.names = admission, names
    return app


_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models")


class _Routes:
    """The routes that only report: models, health, metrics and the interface."""

    def __init__(self, engine: MARAEngine, names: ServedNames, metrics: Metrics, *, has_key: bool) -> None:
        self._engine, self._names, self._metrics = engine, names, metrics
        self._openapi = openapi(has_key=has_key)

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`: the base model, and it with each head."""
        return JSONResponse({"object": "list", "data": [self._model_object(name) for name in self._names.all]})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{model}`."""
        name = request.path_params["model"]
        if name not in self._names.all:
            raise unknown_model(name, self._names)
        return JSONResponse(self._model_object(name))

    def _model_object(self, name: str) -> ModelObject:
        said: ModelObject = {"id": name, "object": "model", "created": 0, "owned_by": "mara_integrations"}
        if self._engine.is_loaded:
            said["max_model_len"] = self._engine.model.context_window
        return said

    async def health(self, request: Request) -> Response:
        """`GET /health`: whether requests can expect an answer; also before the model is loaded."""
        status = self._engine.status
        health: Health = {"status": "ok" if status.is_healthy else "failed", "is_loaded": status.is_loaded}
        return JSONResponse(health, status_code=200 if status.is_healthy else 503)

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`, as Prometheus reads it."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        """`GET /openapi.json`."""
        return JSONResponse(self._openapi)


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = f"{request.method} {shown(request.url.path)}: {error.detail}"
    if error.status_code == 404:
        problem += f" (hint: this server has {', '.join(_PATHS)})"
    refusal = RefusalError(error.status_code, problem, headers=error.headers)
    return JSONResponse(refusal.as_dict(), status_code=refusal.status, headers=refusal.headers)
