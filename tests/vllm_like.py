"""A server that answers as `vllm serve` with our plug-in does, from a script: what it says follows from the request."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from mara_integrations.server.limits import Admission

HEADS = ("brand", "calm")
TEXT = "The quick brown fox."
THOUGHTS = "Let me see."


class VLLMLike:
    """The server, and what it was asked.

    Attributes:
        app: To be served.
        bodies: Bodies of the requests for replies, in order.
        num_open: Replies that are being written.
        owner: What `/v1/models` says of the model's owner; None has no such page.
        has_plug_in: Whether it looks at `mara_head`.
        refusals: Statuses of the next answers, before it answers well.
        fault: What goes wrong in a stream: it `dies`, `hangs`, tells an `error`, `ends` early, or is `not json`.
    """

    def __init__(self, owner: str | None = "vllm", has_plug_in: bool = True) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.num_open = 0
        self.owner, self.has_plug_in = owner, has_plug_in
        self.refusals: list[int] = []
        self.fault: str | None = None
        self.thinks = self.repeats_names = False
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completion, methods=["POST"]),
            ]
        )
        self.app.state.admission = Admission(1)  # `serving` asks for it

    async def models(self, request: Request) -> Any:
        self.keys.append(request.headers["authorization"])
        if self.owner is None:
            return JSONResponse({"detail": "Not Found"}, 404)
        model = {"id": "m", "object": "model", "created": 1, "owned_by": self.owner, "root": "m", "max_model_len": 2048}
        return JSONResponse({"object": "list", "data": [model]})

    async def completion(self, request: Request) -> Any:
        body = await request.json()
        if (refused := self._refused(body)) is not None:
            return refused
        if not body.get("stream"):
            choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None}
            said = {"id": "c", "object": "text_completion", "created": 1, "model": "m"}
            return JSONResponse({**said, "choices": [choice]})
        self.bodies.append(body)
        parts = [{"text": word} for word in TEXT.split(" ")]
        return StreamingResponse(self._events(parts, "stop", "text_completion"), media_type="text/event-stream")

    async def chat(self, request: Request) -> Any:
        body = await request.json()
        self.bodies.append(body)
        if (refused := self._refused(body)) is not None:
            return refused
        parts: list[dict[str, Any]] = [{"delta": {"role": "assistant", "content": ""}}]
        parts += [{"delta": {"reasoning": word}} for word in THOUGHTS.split(" ")] if self.thinks else []
        name, text, reason = self._called(body), TEXT, "stop"
        if name is not None:
            schema = next(t["function"] for t in body["tools"] if t["function"]["name"] == name)["parameters"]
            call = {"index": 0, "id": "chatcmpl-tool-1", "type": "function", "function": {"name": name}}
            written = json.dumps(filled(schema))
            if self.repeats_names:  # as where the tool is named in the request: all in one part, finish reason stop
                call["function"]["arguments"] = written
                parts.append({"delta": {"tool_calls": [call]}})
            else:
                reason = "tool_calls"
                parts.append({"delta": {"tool_calls": [call]}})
                for half in (written[:3], written[3:]):
                    parts.append({"delta": {"tool_calls": [{"index": 0, "function": {"arguments": half}}]}})
            text = ""
        elif (form := body.get("response_format")) is not None:
            text = json.dumps(filled(form["json_schema"]["schema"]))
        words = text.split(" ")
        parts += [{"delta": {"content": f"{word} "}} for word in words[:-1]] + [{"delta": {"content": words[-1]}}]
        if body.get("logprobs"):
            for part in parts[1:]:
                token = {"token": part["delta"].get("content", ""), "bytes": None, "logprob": -0.5}
                part["logprobs"] = {"content": [{**token, "top_logprobs": [token] * body["top_logprobs"]}]}
        return StreamingResponse(self._events(parts, reason, "chat.completion.chunk"), media_type="text/event-stream")

    def _refused(self, body: dict[str, Any]) -> Any:
        if self.refusals:
            error = {"message": "it is too much", "type": "error", "param": None, "code": self.refusals[0]}
            return JSONResponse({"error": error}, self.refusals.pop(0), headers={"retry-after": "0.01"})
        asked = (body.get("vllm_xargs") or {}).get("mara_head", [])
        unknown = [head for head in ([asked] if isinstance(asked, str) else asked) if head not in HEADS]
        if self.has_plug_in and unknown:
            problem = f"no head {unknown[0]!r} is served (hint: heads are brand, calm)"
            error = {"error": {"message": problem, "type": "BadRequestError", "code": 400}}
            if body.get("stream"):  # vLLM has begun to answer by then
                return PlainTextResponse(_event(error) + "data: [DONE]\n\n", media_type="text/event-stream")
            return JSONResponse(error, 400)
        if len(json.dumps(body)) > 20_000:
            problem = "This model's maximum context length is 2048 tokens. However, you requested more."
            return JSONResponse({"error": {"message": problem, "type": "BadRequestError", "code": 400}}, 400)
        if self.fault == "not json":
            return PlainTextResponse("data: {oops\n\n", media_type="text/event-stream")
        return None

    def _called(self, body: dict[str, Any]) -> str | None:
        """The tool that the reply calls; unasked, before it has seen a result."""
        choice, last = body.get("tool_choice", "auto"), body["messages"][-1]
        if not body.get("tools") or (choice == "auto" and last["role"] == "tool"):
            return None
        return choice["function"]["name"] if isinstance(choice, dict) else body["tools"][0]["function"]["name"]

    async def _events(self, parts: list[dict[str, Any]], reason: str, kind: str) -> Any:
        said = {"id": "c", "object": kind, "created": 1, "model": "m"}
        empty: dict[str, Any] = {"delta": {}} if "chat" in kind else {"text": ""}
        self.num_open += 1
        try:
            for number, part in enumerate([*parts, {**empty, "finish_reason": reason}]):
                if number == 2 and self.fault is not None:
                    if self.fault == "dies":
                        raise RuntimeError("killed by its test")
                    if self.fault == "hangs":
                        await asyncio.sleep(30)
                    if self.fault == "error":
                        yield _event({"error": {"message": "engine dead", "type": "InternalServerError", "code": 500}})
                    return
                yield _event({**said, "choices": [{"index": 0, "finish_reason": None, "logprobs": None, **part}]})
                await asyncio.sleep(0)
            usage = {"prompt_tokens": 7, "completion_tokens": len(parts), "total_tokens": 7 + len(parts)}
            yield _event({**said, "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        finally:
            self.num_open -= 1


def filled(schema: dict[str, Any], defs: dict[str, Any] | None = None) -> Any:
    """A value of a JSON schema: what a model under a grammar writes."""
    defs = defs or schema.get("$defs", {})
    if "$ref" in schema:
        return filled(defs[schema["$ref"].split("/")[-1]], defs)
    for union in ("anyOf", "allOf"):
        if union in schema:
            return filled(schema[union][0], defs)
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "object")
    if kind == "object":
        return {name: filled(value, defs) for name, value in schema.get("properties", {}).items()}
    values = {"string": "你好 こんにちは", "integer": 3, "number": 0.5, "boolean": True, "array": [], "null": None}
    return values[kind]


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
