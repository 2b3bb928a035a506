"""Tools and schemas on `ChatMARA`: a tiny model writes nonsense, the grammar makes it legal."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Annotated, Any, Literal

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from mara_integrations import ChatMARA
from mara_integrations.errors import ConfigError

total = partial(reduce, operator.add)  # of the chunks of a stream


Digit = Annotated[int, Field(ge=0, le=9)]  # a model that writes nonsense comes to its end


@tool
def add(a: Digit, b: Digit) -> int:
    """Add two numbers."""
    return a + b


@tool
def sub(a: Digit, b: Digit) -> int:
    """Subtract two numbers."""
    return a - b


class Person(BaseModel):
    name: str = Field(max_length=10)
    age: int = Field(ge=0, le=150)


@pytest.fixture
def caller(llm: ChatMARA) -> ChatMARA:
    return llm.model_copy(update={"max_tokens": 150})


def test_a_forced_call_reaches_the_message_whole_and_streamed(caller: ChatMARA) -> None:
    model = caller.bind_tools([add], tool_choice="any")

    message = model.invoke("hi")
    (call,) = message.tool_calls
    assert call["name"] == "add" and set(call["args"]) == {"a", "b"} and call["id"]
    assert message.content == ""
    chunks = list(model.stream("hi"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert [(each["name"], each["args"]) for each in whole.tool_calls] == [("add", call["args"])]
    assert sum(bool(chunk.tool_call_chunks) for chunk in chunks) > 1  # as it is written, not at the end


async def test_a_forced_call_reaches_the_async_forms(caller: ChatMARA) -> None:
    model = caller.bind_tools([add], tool_choice="add")
    expected = model.invoke("hi").tool_calls[0]["args"]

    assert (await model.ainvoke("hi")).tool_calls[0]["args"] == expected
    chunks = [chunk async for chunk in model.astream("hi")]
    assert "".join(part["args"] or "" for chunk in chunks for part in chunk.tool_call_chunks).startswith("{")


def test_a_call_cut_short_is_invalid_not_an_error(caller: ChatMARA) -> None:
    message = caller.bind_tools([add], tool_choice="any", max_tokens=50).invoke("hi")

    assert message.tool_calls == []
    (call,) = message.invalid_tool_calls
    assert call["name"] == "add" and "length" in str(call["error"])


TWO_CALLS = "\n".join(
    f'<tool_call>\n{{"name": "add", "arguments": {{"a": {a}, "b": 1}}}}\n</tool_call>' for a in (1, 2)
)


@pytest.mark.parametrize(
    ("choice", "parallel", "count"),
    [
        ("auto", None, 2),
        ("auto", True, 2),
        ("auto", False, 1),
        ("any", None, 1),
        ("any", False, 1),
        ("any", True, 2),
        ("add", True, 2),
    ],
)
def test_several_calls_come_where_they_are_allowed(
    says: Callable[..., ChatMARA], choice: str, parallel: bool | None, count: int
) -> None:
    model = says(TWO_CALLS).bind_tools([add], tool_choice=choice, parallel_tool_calls=parallel)

    for message in (model.invoke("hi"), total(model.stream("hi"))):
        assert [call["args"] for call in message.tool_calls] == [{"a": 1, "b": 1}, {"a": 2, "b": 1}][:count]
        assert len({call["id"] for call in message.tool_calls}) == count
        assert message.text.strip() == "" and not message.invalid_tool_calls


def test_a_choice_of_the_call_wins_over_the_bound_one(says: Callable[..., ChatMARA]) -> None:
    model = says("Well.").bind_tools([add, sub], tool_choice="add")

    assert [call["name"] for call in model.invoke("hi").tool_calls] == ["add"]
    assert [call["name"] for call in model.invoke("hi", tool_choice="sub").tool_calls] == ["sub"]
    assert model.invoke("hi", tool_choice="none").content == "Well."
    assert says(TWO_CALLS).bind_tools([add]).invoke("hi", tool_choice="none").content == TWO_CALLS
    model = says("Well.").bind_tools([add, sub], tool_choice="add")
    assert model.invoke("hi", tool_choice="auto").content == "Well."
    forced = {"type": "function", "function": {"name": "sub"}}
    assert [call["name"] for call in model.invoke("hi", tool_choice=forced).tool_calls] == ["sub"]
    with pytest.raises(ConfigError, match="tool_choice='mul'"):
        model.invoke("hi", tool_choice="mul")


def test_text_before_a_call_is_kept(says: Callable[..., ChatMARA]) -> None:
    message = says(f"Let me see.\n{TWO_CALLS}").bind_tools([add]).invoke("hi")

    assert message.content == "Let me see.\n"
    assert len(message.tool_calls) == 2


@pytest.mark.parametrize(
    "reply",
    [
        '{"name": "add", "arguments": [3, 4',  # no tag: nothing holds it to the grammar
        '{"name": "add", "arguments": [3, 4]}',
        '{"name": "add", "arguments": {"a": 3',
        '{"name": "add", "arguments": {"a": "x',
        '{"name": "add", "arguments": {"a": "x\\',
        '{"name": "add", "arguments": {',
        '{"name": "add", "arguments": {"a": }}',
        '{"name": "add", "arg',
        '{"name": "add"}',
    ],
)
def test_a_malformed_call_is_invalid_not_an_error(says: Callable[..., ChatMARA], reply: str) -> None:
    model = says(reply).bind_tools([add])

    for message in (model.invoke("hi"), total(model.stream("hi"))):
        (call,) = message.invalid_tool_calls
        assert call["name"] == "add" and call["id"]
        assert message.tool_calls == [] and message.text == ""


def test_a_wrong_choice_is_refused_when_it_is_bound(caller: ChatMARA) -> None:
    with pytest.raises(ConfigError, match="tool_choice='sub'"):
        caller.bind_tools([add], tool_choice="sub")


def test_bound_tools_are_part_of_the_prompt(caller: ChatMARA) -> None:
    message = HumanMessage("hi")
    usage = caller.bind_tools([add]).invoke([message], max_tokens=1).usage_metadata

    assert usage is not None
    assert usage["input_tokens"] == caller.get_num_tokens_from_messages([message], [add])
    assert usage["input_tokens"] > caller.get_num_tokens_from_messages([message]) + 50


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output_is_an_object_of_the_class(caller: ChatMARA, method: Any) -> None:
    model = caller.with_structured_output(Person, method=method)

    assert isinstance(model.invoke("hi"), Person)
    assert isinstance(list(model.stream("hi"))[-1], Person)
    raw = caller.with_structured_output(Person, method=method, include_raw=True).invoke("hi")
    assert isinstance(raw["parsed"], Person) and raw["parsing_error"] is None and isinstance(raw["raw"], AIMessage)


def test_structured_output_takes_json_schemas_and_typed_dicts(caller: ChatMARA) -> None:
    class Place(TypedDict):
        """A place."""

        city: Literal["Rome", "Bonn"]

    schema = {"title": "Place", "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}

    assert caller.with_structured_output(Place).invoke("hi")["city"] in ("Rome", "Bonn")
    assert isinstance(caller.with_structured_output(schema).invoke("hi")["n"], int)


def test_two_tools_share_no_cached_answer(caller: ChatMARA) -> None:
    caller.cache = InMemoryCache()

    assert caller.bind_tools([add], tool_choice="add").invoke("hi").tool_calls
    assert not caller.invoke("hi").tool_calls
