"""Schemas of every kind, and tools with unusual arguments: a tiny model writes nonsense, the grammar makes it legal."""

from __future__ import annotations

import datetime
import enum
import uuid
import warnings
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from mara_integrations import ChatMARA
from mara_integrations.errors import ConfigError
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what pydantic says of its own first version
    from pydantic import v1


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


Digit = Annotated[int, Field(ge=0, le=9)]


class Inner(BaseModel):
    size: Digit
    tag: Literal["a"] | None = None


class Thing(BaseModel):
    """A "thing": it's {odd} \\ <tool_call>."""

    colour: Colour
    inner: Inner
    many: list[Digit | Literal["x"]] = Field(max_length=2)
    at: datetime.time
    id: uuid.UUID
    maybe: Inner | None = None
    letter: Literal["s", "m"] = "m"
    pair: tuple[Literal[1, 2], bool]
    either: Inner | bool
    is_one: bool = Field(True, description="say \"yes\" or 'no'")


class Tree(BaseModel):
    size: Literal[1, 2]
    children: list[Tree] = Field(max_length=1)


class Typed(TypedDict):
    """Two values."""

    number: Literal[1, 2]
    is_one: bool


class Old(v1.BaseModel):
    """A class of pydantic's first version."""

    number: Literal[1, 2]
    note: str = v1.Field(max_length=5)


METHODS = ["json_schema", "function_calling", "json_mode"]


@pytest.fixture(scope="module")
def llm() -> ChatMARA:
    loaded = (tiny_model(max_position_embeddings=8192), tiny_tokenizer())
    return ChatMARA(loaded, head=random_head(32), max_tokens=500)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schema", [Thing, Tree, Old])
def test_an_answer_is_of_the_class(llm: ChatMARA, schema: Any, method: Any) -> None:
    model = llm.with_structured_output(schema, method=method)

    assert isinstance(model.invoke("hi"), schema)
    assert isinstance(list(model.stream("hi"))[-1], schema)
    raw = llm.with_structured_output(schema, method=method, include_raw=True).invoke("hi")
    assert isinstance(raw["parsed"], schema) and raw["parsing_error"] is None and isinstance(raw["raw"], AIMessage)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schema", [Typed, Tree.model_json_schema(), {"type": "object", "properties": {}}])
def test_an_answer_that_is_a_dictionary_grows_as_it_is_written(llm: ChatMARA, schema: Any, method: Any) -> None:
    answer = llm.with_structured_output(schema, method=method).invoke("hi")
    *partial, last = llm.with_structured_output(schema, method=method).stream("hi")

    assert last == answer and all(set(each) <= set(last) for each in partial)
    if isinstance(schema, dict):
        assert answer == {} or Tree.model_validate(answer)
    else:
        assert set(answer) == {"number", "is_one"}
    parts = list(llm.with_structured_output(schema, method=method, include_raw=True).stream("hi"))
    assert [part["parsed"] for part in parts if "parsed" in part][-1] == answer


def test_letters_of_other_scripts_may_begin_alike(llm: ChatMARA) -> None:
    class Ort(BaseModel):
        größe: Literal["ä", "é"]  # they share their first byte

    assert llm.with_structured_output(Ort).invoke("hi").größe in ("ä", "é")


YES = {"type": "boolean"}
DICTS: list[tuple[dict[str, Any], Callable[[Any], bool]]] = [
    ({"title": "Both", "type": "array", "items": YES, "minItems": 2, "maxItems": 2}, lambda it: len(it) == 2),
    ({"title": "One", "enum": ["a", "b"]}, lambda it: it in ("a", "b")),
    ({"title": "Any", "anyOf": [{"type": "object", "properties": {"a": YES}, "required": ["a"]}]},
     lambda it: "a" in it),
    ({"title": "Map", "type": "object", "patternProperties": {"^[a-z]{1,5}$": YES}, "minProperties": 1,
      "maxProperties": 1},
     lambda it: [type(value) for value in it.values()] == [bool]),
    ({"name": "wrapped", "strict": True, "schema": {"type": "object", "properties": {"a": YES}, "required": ["a"]}},
     lambda it: set(it) == {"a"}),
    ({"type": "json_schema", "json_schema": {"name": "wrapped", "schema": {"enum": [1, 2]}}}, lambda it: it in (1, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "holds"), DICTS, ids=[str(i) for i in range(len(DICTS))])
def test_a_schema_that_is_no_list_of_properties_holds_too(
    llm: ChatMARA, schema: dict[str, Any], holds: Callable[[Any], bool]
) -> None:
    assert holds(llm.with_structured_output(schema).invoke("hi"))
    if "enum" not in str(schema) and schema.get("type") != "array":
        assert holds(llm.with_structured_output(schema, method="function_calling").invoke("hi"))


def test_arguments_that_are_no_object_are_refused(llm: ChatMARA) -> None:
    with pytest.raises(ConfigError, match=r"tool 'Both' has arguments of type 'array', which are an object"):
        llm.bind_tools([DICTS[0][0]])


@tool
def now() -> str:
    """The time."""
    return "now"


NAMES = ["get", "get_all", "get_all_users"]
FORMS = [
    {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}},  # of Anthropic's API
    {"title": "f", "description": "d", "type": "object", "properties": {}},
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}},
]


@pytest.mark.parametrize("given", [now, *FORMS])
def test_a_tool_without_arguments_is_called_without_any(llm: ChatMARA, given: Any) -> None:
    (call,) = llm.bind_tools([given], tool_choice="any").invoke("hi").tool_calls

    assert call["args"] == {}


@pytest.mark.parametrize("given", [Thing, Tree, Old])
def test_a_call_has_arguments_of_its_class(llm: ChatMARA, given: Any) -> None:
    (call,) = llm.bind_tools([given], tool_choice="any").invoke("hi").tool_calls

    given(**call["args"])


@pytest.mark.parametrize("name", NAMES)
def test_tools_may_begin_alike(llm: ChatMARA, name: str) -> None:
    tools = [
        {"title": each, "type": "object", "properties": {"n": {"const": each}}, "required": ["n"]} for each in NAMES
    ]

    (call,) = llm.bind_tools(tools, tool_choice=name).invoke("hi").tool_calls

    assert call["name"] == call["args"]["n"] == name


def test_conversations_of_any_shape_are_read(llm: ChatMARA) -> None:
    call = {"name": "now", "args": {}, "id": "1"}
    turns = [
        HumanMessage("a"),
        SystemMessage("late"),
        AIMessage("", tool_calls=[call]),
        ToolMessage("", tool_call_id="1"),
    ]
    turns += [HumanMessage(""), AIMessage(""), HumanMessage([{"type": "text", "text": "x"}, "y"])]

    assert len(llm.invoke(turns, max_tokens=3).response_metadata["token_ids"]) == 3
