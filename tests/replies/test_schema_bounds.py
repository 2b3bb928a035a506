"""Schemas that would stop the engine are refused at the door, quickly and by name; usual ones pass."""

from __future__ import annotations

import time
from typing import Any

import pytest
from pydantic import BaseModel

from mara_integrations.errors import ConfigError
from mara_integrations.messages import Tool
from mara_integrations.replies.forms import ReplyForm
from mara_integrations.replies.pattern_bounds import pattern_bounds


def with_property(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = with_property(schema)
    return schema


def tower(height: int) -> dict[str, Any]:
    """Ten of ten of ten ...: a small schema whose shortest reply grows tenfold by the floor."""
    floors = {
        f"f{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/f{i - 1}"}] * 10} for i in range(1, height + 1)
    }
    return {"$defs": {"f0": {"const": 1}, **floors}, "$ref": f"#/$defs/f{height}"}


def doubled(times: int) -> dict[str, Any]:
    """Python's objects may share their parts: this one is small in memory and without end as JSON."""
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(times):
        schema = {"anyOf": [schema, schema]}
    return schema


circular: dict[str, Any] = {"type": "object"}
circular["properties"] = {"a": circular}

ENDLESS = {
    "$defs": {"N": {"type": "object", "properties": {"c": {"$ref": "#/$defs/N"}}, "required": ["c"]}},
    "$ref": "#/$defs/N",
}
HOSTILE: dict[str, tuple[Any, str]] = {
    "a pattern repeated by itself": (
        with_property({"type": "string", "pattern": "^(a{1000}){300}$"}),
        "300000 characters",
    ),
    "patterns that are many": (
        {"type": "object", "properties": {f"p{i}": {"type": "string", "pattern": "^.{1,99}$"} for i in range(99)}},
        "characters of patterns",
    ),
    "a pattern of a name": ({"type": "object", "patternProperties": {"^a{99999}$": {}}}, "99999 characters"),
    "a long pattern": (with_property({"type": "string", "pattern": "a" * 1_001}), "at most 1000 characters"),
    "a pattern that is none": (with_property({"type": "string", "pattern": 5}), "the pattern is 5"),
    "a long constant": (with_property({"const": "x" * 100_000}), "shortest value has 100,0"),
    "a string that is long at least": (with_property({"type": "string", "minLength": 1_000_000}), "shortest value"),
    "many items at least": (with_property({"type": "array", "minItems": 10_000}), "minItems is 10000"),
    "many properties at least": ({"type": "object", "minProperties": 10_000}, "minProperties is 10000"),
    "many properties": (
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2_000)}},
        "2000 properties are too many",
    ),
    "many values": (with_property({"enum": [f"value {i}" for i in range(40_000)]}), "bytes"),
    "many schemas": ({"anyOf": [{"type": "null"} for _ in range(5_100)]}, "schemas inside"),
    "many bounds": (
        {"type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": i} for i in range(100)}},
        "different values of maxLength",
    ),
    "deep nesting": (nested(400), "deeper than"),
    "nesting deeper than Python's stack": (nested(100_000), "deeper than"),
    "a circle of objects": (circular, "deeper than"),
    "shared parts": (doubled(60), "larger than"),
    "towers of references": (tower(6), "shortest value"),
    "a required reference to itself": (ENDLESS, "no value of this schema is finite"),
    "one where it may be left out": (
        {"$defs": ENDLESS["$defs"], "anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]},
        "is finite",
    ),
    "references in a circle": ({"$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"$ref": "#/$defs/A"}}, "$ref": "#/$defs/A"},
                               "is finite"),
    "a reference to itself": ({"$ref": "#"}, "is finite"),
    "no value at all": (with_property({"enum": []}), "is finite"),
    "maxLength of text": (with_property({"type": "string", "maxLength": "9"}), "maxLength is '9'"),
    "maxLength of nothing": (with_property({"type": "string", "maxLength": None}), "maxLength is None"),
    "maxLength below 0": (with_property({"type": "string", "maxLength": -5}), "maxLength is -5"),
    "maxLength of truth": (with_property({"type": "string", "maxLength": True}), "maxLength is True"),
    "properties in a list": ({"type": "object", "properties": [1]}, r"properties is \[1\]"),
    "names in a number": ({"type": "object", "required": 5}, "required is 5"),
    "choices in a string": ({"anyOf": "ab"}, "anyOf is 'ab'"),
    "half a character": (with_property({"const": "\ud800"}), "is not JSON"),
    "not a number": (with_property({"const": float("nan")}), "is not JSON"),
    "what JSON does not know": (with_property({"const": {1, 2}}), "is not JSON"),
    "no object": ([{"type": "string"}], "is "),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_refused_at_once(name: str) -> None:
    schema, message = HOSTILE[name]
    start = time.process_time()

    for form in (lambda: ReplyForm(json_schema=schema), lambda: ReplyForm((Tool("f", "", schema),))):
        with pytest.raises(ConfigError, match=message) as caught:
            form()
        assert len(str(caught.value)) < 500

    assert time.process_time() - start < 2.0


class Node(BaseModel):
    value: int
    left: Node | None = None
    children: list[Node] = []


USUAL: list[dict[str, Any]] = [
    {},
    {"type": "object"},
    {"type": "array", "items": True, "maxItems": 100_000},
    Node.model_json_schema(),
    nested(60),
    tower(2),
    with_property({"enum": [f"value {i}" for i in range(1_000)]}),
    with_property({"type": ["string", "null"], "maxLength": 100_000, "pattern": "^[a-z]{1,500}$"}),
    with_property({"type": "object", "additionalProperties": False, "properties": {}}),
    {"type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": 100} for i in range(300)}},
    {"anyOf": [with_property({"const": i}) for i in range(300)]},
    {"properties": {"a~b/c": {"$ref": "#/properties/d%20e"}, "d e": {"type": "integer"}}, "type": "object"},
]


@pytest.mark.parametrize("schema", USUAL)
def test_a_usual_schema_passes(schema: dict[str, Any]) -> None:
    assert ReplyForm(json_schema=schema).json_schema == schema
    ReplyForm((Tool("f", "", schema),))


def test_the_bounds_are_of_all_tools_together() -> None:
    parameters = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(450)}}

    assert ReplyForm(tuple(Tool(f"f{i}", "", parameters) for i in range(10)))
    with pytest.raises(ConfigError, match=r"tool 'f11'.*schemas inside schemas"):
        ReplyForm(tuple(Tool(f"f{i}", "", parameters) for i in range(12)))


@pytest.mark.parametrize("name", ["", 'a"b', "a\nb", "<f>", "a\\b", " a", "a" * 257, 5, None])
def test_a_tool_has_a_name_that_can_be_written(name: Any) -> None:
    with pytest.raises(ConfigError, match="the tool name"):
        ReplyForm((Tool(name),))


@pytest.mark.parametrize("name", ["get_weather", "get weather", "größe", "Response[int]", "a.b-c", "f"])
def test_usual_names_of_tools_pass(name: str) -> None:
    assert ReplyForm((Tool(name),)).tools[0].name == name


@pytest.mark.parametrize(
    ("pattern", "shortest", "size"),
    [
        ("", 0, 0),
        ("abc", 3, 3),
        ("^abc$", 3, 3),
        ("a*b+c?", 1, 3),
        ("a{3}", 3, 3),
        ("a{2,}", 2, 2),
        ("a{2,5}b", 3, 6),
        ("a{0,5}?", 0, 5),
        ("ab{3}", 4, 4),
        ("(ab){3}", 6, 6),
        ("(?:ab|c){3}", 3, 9),
        ("(?P<name>a{10}){10}", 100, 100),
        ("(a{1000}){300}", 300_000, 300_000),
        ("[a-z]{3}[]x]", 4, 4),
        (r"[\]a]{2}\{\d{2}", 5, 5),
        (r"\p{L}{4}\u{41}", 5, 5),
        ("a|", 0, 1),
        ("a{", 2, 2),
        ("a{,5}", 5, 5),
        ("((a", 1, 1),
        ("a)", 2, 2),
        ("(" * 300 + "a" + "{9})" * 10, 9**10, 9**10),
    ],
)
def test_a_pattern_is_measured(pattern: str, shortest: int, size: int) -> None:
    assert pattern_bounds(pattern) == (shortest, size)
