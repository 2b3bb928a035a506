"""JSON schemas and tools of all the forms that LangChain takes, made ready for the grammar."""

from __future__ import annotations

from typing import Any

from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel
from typing_extensions import is_typeddict

from mara_integrations.errors import ConfigError

_OF_TOOLS = {"name", "function", "toolSpec"}  # OpenAI, Anthropic; OpenAI, wrapped; Amazon


def named(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema with a name, without OpenAI's wrapping or a reference at its root; a tool stays as it is."""
    schema = schema.get("json_schema", schema)
    if {"name", "schema"} <= schema.keys():
        schema = {"title": schema["name"], **schema["schema"]}
    definitions, name = schema.get("$defs", {}), schema.get("$ref", "").removeprefix("#/$defs/")
    if name in definitions:
        schema = {**definitions[name], "$defs": definitions}
    return schema if {"title", *_OF_TOOLS} & schema.keys() else {"title": "answer", **schema}


def check_schema(schema: Any) -> None:
    """Refuse what LangChain can't make a JSON schema of.

    Raises:
        ConfigError: If it is a class that is neither of pydantic nor a TypedDict.
    """
    if isinstance(schema, type) and not (is_basemodel_subclass(schema) or is_typeddict(schema)):
        raise ConfigError(
            f"schema={schema!r} is not allowed: it has no fields",
            hint="give a pydantic class, a TypedDict, or a JSON schema as a dict",
        )


def json_schema(schema: Any) -> dict[str, Any] | None:
    """Return the schema of a dict, or of a class with definitions, which LangChain would leave out; None for others."""
    if isinstance(schema, dict):
        return None if _OF_TOOLS & schema.keys() else schema
    if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
        return None
    whole = schema.model_json_schema()
    return named(whole) if "$defs" in whole else None


def openai_tool(tool: Any) -> dict[str, Any]:
    """Return a tool of any kind in OpenAI's form.

    Raises:
        ConfigError: If its arguments are not an object.
    """
    converted = convert_to_openai_tool(tool)
    if schema := json_schema(tool):
        if schema.get("type", "object") != "object":
            raise ConfigError(
                f"tool {converted['function']['name']!r} has arguments of type {schema['type']!r}, which are an object",
                hint="with_structured_output(..., method='json_schema') takes any",
            )
        said_already = ("title", "description")
        parameters = {key: value for key, value in schema.items() if key not in said_already}
        converted["function"]["parameters"] = parameters
    return converted
