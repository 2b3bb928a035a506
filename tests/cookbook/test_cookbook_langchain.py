"""The recipes for LangChain, run as they are, on the 135M model; tests of the frameworks' agents on what they build."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain_core.messages import AIMessage, ToolMessage

from mara_integrations import ChatMARA
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer

COOKBOOK = Path(__file__).parents[2] / "cookbook"


def recipe(name: str) -> dict[str, Any]:
    return runpy.run_path(str(COOKBOOK / name))


@pytest.mark.slow
@pytest.mark.usefixtures("embedded")
def test_an_agent_finishes_a_task_of_two_tools(capsys: pytest.CaptureFixture[str]) -> None:
    result = recipe("01_langchain_agent_with_tools.py")["main"]()

    _, first, price, second, dollars, answer = result["messages"]
    assert [call["name"] for call in (*first.tool_calls, *second.tool_calls)] == ["find_price", "euros_to_dollars"]
    assert first.tool_calls[0]["args"] == {"article": "lamp"} and price.text == "25 euros"
    assert second.tool_calls[0]["args"] == {"euros": 25} and dollars.text == "27.50 dollars"
    assert "27.50" in answer.text and not answer.tool_calls
    assert result["num_chunks"] > 6  # three messages, each in pieces; what was drafted comes in one
    assert '[find_price] {"article": "lamp"}' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("embedded")
def test_an_agent_remembers_its_thread_alone() -> None:
    result = recipe("02_langgraph_agent_with_memory.py")["main"]()

    assert result["notes"] == ["The customer wants green curtains."]
    assert [message.type for message in result["ann"]] == ["human", "ai", "tool", "ai", "human", "ai"]
    assert [message.type for message in result["bob"]] == ["human", "ai"]
    assert "green" in result["ann"][-1].text and "green" not in result["bob"][-1].text


@pytest.mark.slow
@pytest.mark.usefixtures("embedded")
def test_reviews_become_objects() -> None:
    first, second = recipe("03_structured_extraction.py")["main"]()

    assert (first.article, first.mood, first.stars) == ("lamp", "happy", 5)
    assert (second.article, second.mood, second.stars) == ("chair", "unhappy", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("embedded")
def test_guardrails_hide_personal_data() -> None:
    result = recipe("04_guardrails.py")["main"]()

    assert "ann@example.com" not in result["read"] and "192.168.0.7" not in result["read"]
    assert "[REDACTED_EMAIL]" in result["read"]
    assert result["answer"]


@pytest.mark.slow
@pytest.mark.usefixtures("embedded")
def test_what_chathuggingface_ignores_takes_effect() -> None:
    result = recipe("05_migrating_from_chathuggingface.py")["main"]()

    assert "\n" not in result["answer"].text and result["answer"].usage_metadata["output_tokens"] <= 24
    assert result["call"]["name"] == "opening_hours" and set(result["call"]["args"]) == {"day"}
    assert result["season"].name == "winter"
    assert len(result["together"]) == 2 and all(result["together"])


@pytest.mark.slow
@pytest.mark.usefixtures("embedded")
def test_an_endpoint_streams_to_two_clients() -> None:
    answers = recipe("06_fastapi_streaming.py")["main"]()

    assert [counts["usage"]["output_tokens"] for _, counts in answers] == [16, 16]
    assert all(text for text, _ in answers)


# --- the same on a tiny model, in a second


@pytest.fixture
def tiny() -> ChatMARA:
    model = tiny_model(max_position_embeddings=4096)
    return ChatMARA((model, tiny_tokenizer()), head=random_head(32), max_tokens=150)


async def test_the_endpoint_sends_what_the_model_writes_in_pieces(tiny: ChatMARA) -> None:
    app = recipe("06_fastapi_streaming.py")["create_app"](tiny.model_copy(update={"max_tokens": 12}))
    transport = httpx.ASGITransport(app)

    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post("/ask", json={"question": "hi", "strength": 0})
        refused = await client.post("/ask", json={"question": "hi", "strength": -1})

    data = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "".join(piece["text"] for piece in data[:-1]) == tiny.invoke("hi", max_tokens=12, strength=0).text
    assert data[-1]["usage"]["output_tokens"] == 12
    assert refused.status_code == 422


@pytest.mark.filterwarnings("ignore")  # NeMo's own
def test_nemo_guardrails_takes_the_model(says: Callable[[str], ChatMARA]) -> None:
    pytest.importorskip("nemoguardrails", reason="NeMo Guardrails is not installed, and in no extra: pip install it")

    assert recipe("04_guardrails.py")["with_nemo"](says("By the link below.")) == "By the link below."


def test_the_graph_runs_the_tool_it_forces(tiny: ChatMARA) -> None:
    graph = recipe("02_langgraph_agent_with_memory.py")["build"](tiny)
    config = {"configurable": {"thread_id": "a"}}

    seen: dict[str, list[Any]] = {"note": [], "tools": [], "answer": []}
    for chunk, about in graph.stream({"messages": [("human", "red!")]}, config, stream_mode="messages"):
        seen[about["langgraph_node"]].append(chunk)

    written = "".join(part["args"] or "" for chunk in seen["note"] for part in chunk.tool_call_chunks)
    (result,) = seen["tools"]
    assert isinstance(result, ToolMessage)
    assert result.text == f"The customer wants {json.loads(written)['colour']} curtains."
    assert len(seen["note"]) > 1 and len(seen["answer"]) > 1  # as they were written; what was drafted comes in one
    _, call, _, answer = graph.get_state(config).values["messages"]
    assert call.tool_calls[0]["name"] == "write_down" and isinstance(answer, AIMessage)


async def test_create_agent_streams_forced_calls_and_ends(tiny: ChatMARA) -> None:
    from langchain.agents import create_agent
    from langchain.agents.middleware import wrap_model_call
    from langchain_core.tools import tool

    @tool
    def roll(sides: int) -> str:
        """Roll a die."""
        return "3"

    @wrap_model_call
    async def first_a_tool(request: Any, handler: Callable[[Any], Any]) -> Any:
        is_first = not any(isinstance(message, ToolMessage) for message in request.messages)
        return await handler(request.override(tool_choice="roll" if is_first else "none"))

    agent = create_agent(tiny, [roll], middleware=[first_a_tool])
    names, parts = [], []
    async for chunk, _ in agent.astream({"messages": [("human", "Roll!")]}, stream_mode="messages"):
        for part in getattr(chunk, "tool_call_chunks", ()):
            names += [part["name"]] if part["name"] else []
            parts.append(part["args"])

    assert names == ["roll"]
    assert set(json.loads("".join(parts))) == {"sides"} and len(parts) > 3


def test_create_agent_takes_the_models_own_structured_output(tiny: ChatMARA) -> None:
    from langchain.agents import create_agent
    from pydantic import BaseModel

    class Die(BaseModel):
        is_fair: bool

    agent = create_agent(tiny, [], response_format=Die)

    assert isinstance(agent.invoke({"messages": [("human", "Roll!")]})["structured_response"], Die)
