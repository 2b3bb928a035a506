"""A streaming endpoint in FastAPI: tokens as server-sent events, many clients at once, on one model.

`astream` never blocks the event loop, and what several clients ask at the same time is decoded together. When a client
goes away, its stream is closed and the generation stops at its next token.

    uvicorn --factory --app-dir cookbook 06_fastapi_streaming:create_app      # needs: pip install fastapi uvicorn
    curl -N localhost:8000/ask -d '{"question": "What is a lamp?"}' -H 'content-type: application/json'
    python cookbook/06_fastapi_streaming.py [head]                            # asks itself, without a port
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from mara_integrations import ChatMARA


class Question(BaseModel):
    question: str
    strength: float | None = Field(None, ge=0)  # a setting of one request: 0 is the base model


def create_app(model: ChatMARA | None = None) -> FastAPI:
    """The application; the model is loaded with the first question."""
    app, llm = FastAPI(), model or ChatMARA("smollm2", max_tokens=200)

    @app.post("/ask")
    async def ask(asked: Question) -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            async for chunk in llm.astream(asked.question, strength=asked.strength):
                if chunk.text:
                    yield f"data: {json.dumps({'text': chunk.text})}\n\n"
                if chunk.usage_metadata:  # the last one
                    counts = {"usage": chunk.usage_metadata, "gate": chunk.response_metadata["gate"]}
                    yield f"event: done\ndata: {json.dumps(counts)}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


async def ask(client: httpx.AsyncClient, question: str) -> tuple[str, dict[str, Any]]:
    """What a client does: add the pieces up; returns text and counts."""
    text, counts = "", {}
    async with client.stream("POST", "/ask", json={"question": question}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                data = json.loads(line.removeprefix("data: "))
                text, counts = text + data.pop("text", ""), {**counts, **data}
    return text, counts


def main(head: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Two clients at once.

    Args:
        head: A trained head.
    """

    async def clients() -> list[tuple[str, dict[str, Any]]]:
        app = create_app(ChatMARA("smollm2", head=head, max_tokens=16))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop", timeout=None) as client:
            return await asyncio.gather(*(ask(client, f"What is a {noun}?") for noun in ("chair", "lamp")))

    answers = asyncio.run(clients())
    for text, counts in answers:
        print(f"{text}\n  {counts}\n")
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:])
