"""One generation request over HTTP, from its body to the last byte of its answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from pydantic_core import to_json
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mara_integrations.engine.generation import Generation
from mara_integrations.engine.request import Request
from mara_integrations.engine.streams import AsyncStream
from mara_integrations.engine.tickets import Update
from mara_integrations.errors import ConfigError, ContextLengthError, ModelError
from mara_integrations.runtime import MARAEngine
from mara_integrations.server.answers import ChatAnswer, CompletionAnswer
from mara_integrations.server.errors import RefusalError, is_fault_of_server, refusal_of, shown
from mara_integrations.server.limits import (
    SEND_TIMEOUT_S,
    Admission,
    ServerLimits,
    all_or_none,
    in_thread,
    read_body,
    timed,
    while_connected,
)
from mara_integrations.server.metrics import Metrics
from mara_integrations.server.names import ServedNames
from mara_integrations.server.observing import Observation
from mara_integrations.server.requests import EngineCall, read_json

_log = logging.getLogger(__name__)

# Bodies of fewer bytes are parsed at once: going to a thread would take longer.
_LONG_BODY_BYTES = 64 << 10
# Unknown fields are logged once each, but not without end.
_MAX_LOGGED_FIELDS = 100
_EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class GenerationEndpoint:
    """An ASGI application that answers generation requests of one kind.

    Args:
        engine: Loaded on the first request, if it is not yet.
        admission: Counts the sequences of all endpoints.
        metrics: Counts replies.
        names: The model and the heads that requests may name.
        limits: Bound the bodies of requests.
        read: Checks a parsed body.
        answer: Makes the answer's objects.
    """

    def __init__(
        self,
        engine: MARAEngine,
        admission: Admission,
        metrics: Metrics,
        names: ServedNames,
        limits: ServerLimits,
        read: Callable[[Mapping[str, Any], ServedNames], EngineCall],
        answer: type[ChatAnswer] | type[CompletionAnswer],
    ) -> None:
        self._engine, self._admission, self._metrics = engine, admission, metrics
        self._names, self._read, self._answer = names, read, answer
        self._limits = limits
        self._logged_fields: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            RefusalError: If it is refused.
            Exception: Whatever fails in the engine before the answer has begun.
        """
        observation = Observation.of(scope)
        self._admission.require_room()
        body = await read_body(receive, Headers(scope=scope), self._limits)
        call = self._parsed(body) if len(body) < _LONG_BODY_BYTES else await in_thread(self._parsed, body)
        observation.model = call.model
        self._log_ignored(call)
        with self._admission.reserve(len(call.prompts)):
            reply = self._stream if call.is_stream else self._whole
            await while_connected(receive, reply(call, observation, scope, timed(send, SEND_TIMEOUT_S)))

    def _parsed(self, body: bytes) -> EngineCall:
        return self._read(read_json(body), self._names)

    async def _whole(self, call: EngineCall, observation: Observation, scope: Scope, send: Send) -> None:
        requests = await in_thread(self._requests, call)
        self._observe_prompts(requests, observation)
        streams = [self._engine.astream(request) for request in requests]
        generations = await all_or_none([self._finished(stream, observation) for stream in streams])
        content = await in_thread(lambda: _json(self._answer(call, self._engine.model).whole(generations)))
        await Response(content, media_type="application/json")(scope, _never, send)

    async def _finished(self, stream: AsyncStream[Update], observation: Observation) -> Generation:
        async with aclosing(stream) as updates:
            async for update in updates:
                self._observe(update, observation)
                if update.generation is not None:
                    return update.generation
        raise AssertionError("a stream ends with its generation")

    async def _stream(self, call: EngineCall, observation: Observation, scope: Scope, send: Send) -> None:
        (request,) = requests = await in_thread(self._requests, call)
        self._observe_prompts(requests, observation)
        answer = self._answer(call, self._engine.model)
        async with aclosing(self._engine.astream(request)) as updates:
            first = await anext(updates)  # what fails before the first token still has a status of its own
            await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
            async for event in self._events(first, updates, answer, call, observation):
                if event:  # an update may hold back what could become a call or a stop string
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        end = b"data: [DONE]\n\n" if observation.status == 200 else b""
        await send({"type": "http.response.body", "body": end})

    async def _events(
        self,
        update: Update,
        updates: AsyncIterator[Update],
        answer: ChatAnswer | CompletionAnswer,
        call: EngineCall,
        observation: Observation,
    ) -> AsyncIterator[bytes]:
        is_first = True
        try:
            while True:
                self._observe(update, observation)
                is_long = update.generation is not None and call.top_logprobs is not None  # a report of all tokens
                encode = partial(_encoded, answer, update, is_first)
                yield await in_thread(encode) if is_long else encode()
                if update.generation is not None:
                    return
                update, is_first = await anext(updates), False
        except Exception as error:  # the status is sent, so the stream is the only place to tell it
            refusal = refusal_of(error)
            observation.status = refusal.status
            if is_fault_of_server(error):
                _log.exception("a stream failed")
            yield _event(refusal.as_dict())

    def _requests(self, call: EngineCall) -> list[Request]:
        """Return the engine's requests, one a prompt; whichever is refused, none is decoded. Loads the model."""
        model = self._engine.model
        try:
            settings = call.settings
            if call.top_logprobs is not None:
                settings = {**settings, **self._engine.log_prob_settings(call.top_logprobs)}
            return [self._engine.request(prompt, **settings) for prompt in call.prompts]
        except (ConfigError, ModelError) as error:  # a ModelError now: the chat template refuses this conversation
            code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
            message = self._names.public(str(error), model.name)
            raise RefusalError(400, message, code=code) from error

    def _observe_prompts(self, requests: Sequence[Request], observation: Observation) -> None:
        observation.prompt_tokens = sum(len(request.prompt_ids) for request in requests)
        self._metrics.count_tokens("prompt", observation.prompt_tokens)

    def _observe(self, update: Update, observation: Observation) -> None:
        if observation.first_token_s is None:
            observation.first_token_s = time.perf_counter() - observation.began_s
            self._metrics.count_first_token(observation.first_token_s)
        observation.completion_tokens += len(update.token_ids)
        self._metrics.count_tokens("completion", len(update.token_ids))
        if update.generation is not None:
            self._metrics.count_reply(len(update.generation.token_ids))

    def _log_ignored(self, call: EngineCall) -> None:
        for name in call.ignored:
            if name not in self._logged_fields and len(self._logged_fields) < _MAX_LOGGED_FIELDS:
                self._logged_fields.add(name)
                _log.warning("requests carry the field %s, which this server does not know and ignores", shown(name))


def _encoded(answer: ChatAnswer | CompletionAnswer, update: Update, is_first: bool) -> bytes:
    return b"".join(map(_event, answer.chunks(update, is_first)))


def _event(content: Any) -> bytes:
    return b"data: " + _json(content) + b"\n\n"


def _json(content: Any) -> bytes:
    return to_json(content, inf_nan_mode="null")


async def _never() -> Any:
    await asyncio.Event().wait()
