"""The description of the HTTP interface that `/openapi.json` shows, made of the declarations that the server uses."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from mara_integrations import __version__
from mara_integrations.server.bodies import ChatBody, CompletionBody
from mara_integrations.server.objects import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    ErrorObject,
    Health,
    ModelList,
    ModelObject,
)

_ANSWERS = (ChatCompletion, ChatCompletionChunk, Completion, ModelList, ModelObject, Health, ErrorObject)
_TEMPLATE = "#/components/schemas/{model}"


def openapi(*, has_key: bool) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document.

    Args:
        has_key: Whether requests have to bring an API key.
    """
    _, bodies = models_json_schema([(ChatBody, "validation"), (CompletionBody, "validation")], ref_template=_TEMPLATE)
    schemas: dict[str, Any] = dict(bodies["$defs"])
    for kind in _ANSWERS:
        schema = TypeAdapter(kind).json_schema(ref_template=_TEMPLATE)
        schemas.update(schema.pop("$defs", {}))
        schemas[kind.__name__] = schema
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "mara_integrations", "version": __version__},
        "paths": {
            "/v1/chat/completions": {
                "post": _generation("Answer a conversation", "ChatRequest", "ChatCompletion", "ChatCompletionChunk")
            },
            "/v1/completions": {
                "post": _generation("Continue a text", "CompletionRequest", "Completion", "Completion")
            },
            "/v1/models": {"get": _operation("List the models", "ModelList")},
            "/v1/models/{model}": {"get": {**_operation("Describe a model", "ModelObject"), "parameters": [_MODEL]}},
            "/health": {"get": _operation("Tell whether the server can answer", "Health", is_open=True)},
            "/metrics": {"get": _operation("Counts and durations, for Prometheus", None)},
        },
        "components": {"schemas": schemas},
    }
    if has_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


_MODEL = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}


def _operation(summary: str, answer: str | None, *, is_open: bool = False) -> dict[str, Any]:
    content = {"text/plain": {"schema": {"type": "string"}}} if answer is None else _json(answer)
    responses = {"200": {"description": summary, "content": content}, "default": _error()}
    if is_open:  # its answer says itself what is wrong
        responses["503"] = {"description": "The server can't answer", "content": content}
    return {"summary": summary, "responses": responses, **({"security": []} if is_open else {})}


def _generation(summary: str, body: str, answer: str, chunk: str) -> dict[str, Any]:
    operation = _operation(summary, answer)
    parts = [{"$ref": _TEMPLATE.format(model=name)} for name in (chunk, "ErrorObject")]
    part = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": parts}}
    data = {"description": "A chunk, or an error; `[DONE]` is the last.", "anyOf": [{"const": "[DONE]"}, part]}
    event = {"type": "object", "description": "An event, with `stream`.", "properties": {"data": data}}
    operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {**event, "required": ["data"]}}
    return {**operation, "requestBody": {"required": True, "content": _json(body)}}


def _error() -> dict[str, Any]:
    return {"description": "What was wrong, as OpenAI's API says it", "content": _json("ErrorObject")}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _TEMPLATE.format(model=name)}}}
