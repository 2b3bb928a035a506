"""Poisoned requests beside innocent ones: whatever becomes of the former, the latter get every token they get alone."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hostile import DEEP_LIST, forms
from serving import CHAT, Caller, client_of, events, post, text_of, until

from mara_integrations.server import create_app
from mara_integrations.testing import random_head

INNOCENT = [
    {**CHAT, "max_tokens": 40, "messages": [{"role": "user", "content": text}], **more}
    for text, more in (("one", {}), ("two", {"model": "tiny:brand"}), ("three", {"temperature": 1.0, "seed": 5}))
]
POISON: dict[str, dict[str, Any]] = {
    "temperature close to zero": {"temperature": 1e-38},
    "temperature below float32": {"temperature": 1e-45},
    "more candidates than int64": {"min_candidates": 2**63},
    "more candidates than tokens": {"min_candidates": 10**6, "top_p": 1.0},
    "no filter under a head": {"head": "brand", "top_k": 49_152, "top_p": 1.0},
    "largest strength": {"head": "brand", "strength": 1000, "temperature": 100},
    "head of NaN": {"head": "nan"},
    "head of infinities": {"head": "infinite", "temperature": 1.0},
    "head that asks for too many candidates": {"head": "greedy"},
    "deep constant": forms({"const": DEEP_LIST})[1],
    "form that can not be": forms({"type": "string", "minLength": 9, "maxLength": 3})[0],
    "reference to itself": forms({"$ref": "#"})[0],
    "thousands of properties": forms({"type": "object", "properties": {f"p{i}": {} for i in range(5000)}})[1],
    "every stop string": {"stop": [chr(i) * 1000 for i in range(33, 97)]},
    "every token reported": {"logprobs": True, "top_logprobs": 20, "max_tokens": 10**9, "top_k": 10**6},
    "leaves at once": {"stream": True},
}


@pytest.fixture
def app(engine, heads):
    import torch

    broken = {}
    for name, value in (("nan", torch.nan), ("infinite", torch.inf)):
        broken[name] = random_head(32, "residual")
        with torch.no_grad():
            broken[name].output_linear.weight.fill_(value)
    broken["greedy"] = random_head(32, "residual", min_candidates=10**6)
    return create_app(engine, {**heads, **broken}, name="tiny")


@pytest.mark.parametrize("kind", POISON)
async def test_innocent_streams_are_not_harmed(app, kind):
    async with client_of(app) as client:
        alone = [await post(client, **body) for body in INNOCENT]
        streams = [asyncio.create_task(events(client, **body)) for body in INNOCENT]
        await until(lambda: app.state.admission.num_running == len(INNOCENT))
        body = {**CHAT, **POISON[kind]}
        if kind == "leaves at once":
            caller = Caller(app, body)
            caller.leaves.set()
            await asyncio.wait_for(caller.call(), 20)
        else:
            response = await asyncio.wait_for(
                client.post(
                    "/v1/chat/completions",
                    content=json.dumps(body).encode(),
                    headers={"content-type": "application/json"},
                ),
                20,
            )
            assert response.status_code == 200 or "error" in response.json()
        together = await asyncio.wait_for(asyncio.gather(*streams), 60)
        assert [text_of(chunks) for chunks in together] == [
            answer["choices"][0]["message"]["content"] for answer in alone
        ]
        assert (await client.get("/health")).status_code == 200
