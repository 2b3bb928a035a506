"""Neither a call nor an object that `max_tokens` cuts is made up: both frameworks and the server say it was cut."""

from __future__ import annotations

import json
import operator
from functools import partial, reduce
from typing import Any

import pytest
from langchain_core.exceptions import OutputParserException
from llama_index.core import PromptTemplate
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel
from scripted import writes

from mara_integrations import MARALLM
from mara_integrations.errors import CutReplyError
from mara_integrations.frameworks.schemas import openai_tool
from mara_integrations.testing import random_head

pytest.importorskip("xgrammar", reason="needs the tools extra")
pytest.importorskip("fastapi", reason="needs the serve extra")

from fastapi.testclient import TestClient

from mara_integrations.server import create_app

total = partial(reduce, operator.add)  # of the chunks of a stream
ASK = "Ann Smith asks for a refund of 250 euro. The refund is not approved."
TEMPLATE = PromptTemplate(ASK)


class Refund(BaseModel):
    """A refund: every field could be left out, so that half of one would be taken for a whole one."""

    customer: str = ""
    amount_euro: int = 0
    approved: bool = True


REFUND = Refund(customer="Ann Smith", amount_euro=250, approved=False)
OBJECT = '{"customer": "Ann Smith", "amount_euro": 250, "approved": false}'
CALL = f'<tool_call>\n{{"name": "Refund", "arguments": {OBJECT}}}\n</tool_call>'
# One token a character, and the end of the reply
NEEDED = {"json_schema": len(OBJECT) + 1, "function_calling": len(CALL) + 1}
TEXT = {"json_schema": OBJECT, "function_calling": CALL}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "Refund", "schema": Refund.model_json_schema()}}
TOOL = {"type": "function", "function": {"name": "Refund", "parameters": Refund.model_json_schema()}}


def refund(customer: str = "", amount_euro: int = 0, approved: bool = True) -> str:
    """Pay money back."""
    raise AssertionError("a call that was cut was made")


METHODS = ["json_schema", "function_calling"]
# From nothing at all to plenty, and every budget around the need
BUDGETS = [(method, short) for method in METHODS for short in (*range(-4, 17), NEEDED[method] // 2, NEEDED[method] - 1)]


@pytest.mark.parametrize(("method", "short"), BUDGETS)
def test_langchain_parses_a_whole_object_and_no_other(method: Any, short: int) -> None:
    """`short`: tokens that are missing; a negative number is left over."""
    llm = writes(TEXT[method], max_tokens=NEEDED[method] - short)
    model = llm.with_structured_output(Refund, method=method)
    raw = llm.with_structured_output(Refund, method=method, include_raw=True).invoke(ASK)

    if short <= 0:
        assert model.invoke(ASK) == REFUND
        assert list(model.stream(ASK))[-1] == REFUND
        assert raw["parsed"] == REFUND and raw["parsing_error"] is None
        assert raw["raw"].response_metadata["finish_reason"] == "stop"
        return
    for call in (model.invoke, lambda prompt: list(model.stream(prompt))):
        with pytest.raises(OutputParserException, match="raise max_tokens"):
            call(ASK)
    assert raw["parsed"] is None and "raise max_tokens" in str(raw["parsing_error"])
    assert raw["raw"].response_metadata["finish_reason"] == "length"


@pytest.mark.parametrize("short", [-1, 0, 1, 5, 14, 40, 60, 80, 100])
def test_langchain_has_an_invalid_call_for_one_that_was_cut(short: int) -> None:
    llm = writes(CALL, max_tokens=NEEDED["function_calling"] - short)
    model = llm.bind_tools([Refund], tool_choice="any")

    message, streamed = model.invoke(ASK), total(model.stream(ASK))

    for each in (message, streamed):
        assert each.text == ""
        assert each.response_metadata["finish_reason"] == ("length" if short > 0 else "stop")
        assert [call["args"] for call in each.tool_calls] == ([] if short > 0 else [REFUND.model_dump()])
        assert len(each.invalid_tool_calls) == int(short > 0)
    if short > 0:
        assert "raise max_tokens" in str(message.invalid_tool_calls[0]["error"])


def test_of_two_calls_the_first_is_whole_where_the_second_was_cut() -> None:
    llm = writes(f"{CALL}\n{CALL}", max_tokens=len(CALL) + 60)

    message = llm.bind_tools([Refund]).invoke(ASK)

    assert [call["args"] for call in message.tool_calls] == [REFUND.model_dump()]
    assert len(message.invalid_tool_calls) == 1


def test_a_call_that_text_follows_is_whole() -> None:
    llm = writes(f"{CALL} And then there was much to be said about it.", max_tokens=len(CALL) + 20)

    message = llm.bind_tools([Refund]).invoke(ASK)

    assert message.response_metadata["finish_reason"] == "length"
    assert [call["args"] for call in message.tool_calls] == [REFUND.model_dump()] and not message.invalid_tool_calls


@pytest.mark.parametrize("method", METHODS)
def test_a_stop_string_inside_an_object_leaves_no_object(method: Any) -> None:
    model = writes(TEXT[method], stop=[" 250"]).with_structured_output(Refund, method=method)

    for call in (model.invoke, lambda prompt: list(model.stream(prompt))):
        with pytest.raises(OutputParserException):
            call(ASK)


@pytest.mark.usefixtures("event_loop")
@pytest.mark.parametrize("short", [-4, -1, 0, 1, 2, 8, 14, 16, 40, 60, 80, 120])
def test_llama_index_predicts_a_whole_object_and_no_other(short: int) -> None:
    llm = writes(CALL, max_tokens=NEEDED["function_calling"] - short)
    tool = FunctionTool.from_defaults(refund, name="Refund")

    if short <= 0:
        assert llm.structured_predict(Refund, TEMPLATE) == REFUND
        return
    with pytest.raises(CutReplyError, match="raise max_tokens"):
        llm.structured_predict(Refund, TEMPLATE)
    with pytest.raises(CutReplyError, match="raise max_tokens"):
        llm.predict_and_call([tool], ASK, tool_required=True)
    response = llm.chat_with_tools([tool], ASK, tool_required=True)
    assert response.raw["finish_reason"] == "length"


@pytest.mark.parametrize("short", [-1, 0, 1, 14, 40])
async def test_llama_index_streams_to_a_whole_object_or_to_an_error(short: int) -> None:
    llm = writes(OBJECT, max_tokens=NEEDED["json_schema"] - short)

    if short <= 0:
        assert list(llm.stream_structured_predict(Refund, TEMPLATE))[-1] == REFUND
        objects = [each async for each in await llm.astream_structured_predict(Refund, TEMPLATE)]
        assert objects[-1] == REFUND
        return
    with pytest.raises(CutReplyError, match="raise max_tokens"):
        list(llm.stream_structured_predict(Refund, TEMPLATE))
    with pytest.raises(CutReplyError, match="raise max_tokens"):
        [each async for each in await llm.astream_structured_predict(Refund, TEMPLATE)]


async def test_a_streamed_call_that_was_cut_is_not_made() -> None:
    llm = writes(CALL, max_tokens=NEEDED["function_calling"] - 20)
    tool = FunctionTool.from_defaults(refund, name="Refund")

    *before, last = [each async for each in await llm.astream_chat_with_tools([tool], ASK, tool_required=True)]

    assert llm.get_tool_calls_from_response(before[-1])[0].tool_kwargs  # what is there so far, for those who show it
    with pytest.raises(CutReplyError):
        llm.get_tool_calls_from_response(last, error_on_no_tool_call=False)


def _parts(client: TestClient, body: dict[str, Any]) -> tuple[str, str, str]:
    """Text, arguments and finish reason of a stream."""
    response = client.post("/v1/chat/completions", json={**body, "stream": True})
    events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
    return (
        "".join(choice["delta"].get("content") or "" for choice in choices),
        "".join(call["function"]["arguments"] for call in calls),
        choices[-1]["finish_reason"],
    )


@pytest.mark.parametrize("short", [-4, -1, 0, 1, 2, 14, 16, 40, 60])
def test_over_http_a_cut_reply_ends_with_length(short: int) -> None:
    ask = {"messages": [{"role": "user", "content": ASK}]}
    client = TestClient(create_app(writes(CALL).engine, name="m"))
    call = {**ask, "tools": [TOOL], "tool_choice": "required", "max_tokens": NEEDED["function_calling"] - short}

    choice = client.post("/v1/chat/completions", json=call).json()["choices"][0]
    text, arguments, reason = _parts(client, call)

    assert choice["finish_reason"] == reason == ("length" if short > 0 else "tool_calls")
    (written,) = choice["message"]["tool_calls"]
    assert text == "" and arguments == written["function"]["arguments"]
    assert OBJECT.startswith(arguments)

    client = TestClient(create_app(writes(OBJECT).engine, name="m"))
    call = {**ask, "response_format": SCHEMA, "max_tokens": NEEDED["json_schema"] - short}

    choice = client.post("/v1/chat/completions", json=call).json()["choices"][0]
    text, _, reason = _parts(client, call)

    assert choice["finish_reason"] == reason == ("length" if short > 0 else "stop")
    assert choice["message"]["content"] == text == OBJECT[: call["max_tokens"]]


@pytest.mark.slow
@pytest.mark.usefixtures("event_loop", "embedded")
@pytest.mark.parametrize("head", [None, "random"])
def test_a_real_model_fills_nothing_in(head: str | None) -> None:
    llm = MARALLM("smollm2", max_tokens=200)
    with_head = {"head": random_head(llm.engine.model.hidden_size, "residual")} if head else {}
    schema = {"title": "Refund", **Refund.model_json_schema(), "required": list(Refund.model_fields)}
    schema["properties"]["customer"]["maxLength"] = 6  # a small model ends a string late
    whole = llm.with_structured_output(schema, method="function_calling", include_raw=True, **with_head).invoke(ASK)
    needed = whole["raw"].usage_metadata["output_tokens"]
    assert whole["raw"].response_metadata["finish_reason"] == "stop" and whole["parsed"]

    for budget in (needed, needed - 1, 5):
        given = {"max_tokens": budget, **with_head}
        model = llm.with_structured_output(schema, method="function_calling", include_raw=True, **given)
        found = model.invoke(ASK)
        assert found["parsed"] == (whole["parsed"] if budget >= needed else None)
        assert (found["parsing_error"] is None) == (budget >= needed)
        forced = llm.chat([ChatMessage(ASK)], tools=[openai_tool(schema)], tool_choice="any", **given)
        if budget >= needed:
            assert llm.get_tool_calls_from_response(forced)[0].tool_kwargs == whole["parsed"]
        else:
            with pytest.raises(CutReplyError):
                llm.get_tool_calls_from_response(forced)
