"""Parses values of a row into messages and tools, in the form that chat templates, TRL and OpenAI's API share."""

from __future__ import annotations

import json
from typing import Any, get_args

from mara_integrations.data.records import BadRowError, is_too_deep, short
from mara_integrations.messages import Message, Role, Tool, ToolCall


def text_of(name: str, value: Any) -> str:
    """Return a text that a tokenizer can encode; the parts of a list of text parts are joined.

    Raises:
        BadRowError: If it is not text, or blank.
    """
    parts = value if isinstance(value, list) else []
    if parts and all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        value = "\n".join(str(part.get("text", "")) for part in parts)
    if not isinstance(value, str):
        raise BadRowError(f"{name!r} is {short(value)}", hint="a string is needed")
    if not value.strip():
        raise BadRowError(f"{name!r} is empty")
    return _encodable(name, value)


def messages_of(name: str, value: Any) -> tuple[Message, ...]:
    """Return a conversation from a list of `{"role", "content"}`, with calls and results of tools.

    Raises:
        BadRowError: If it is no such list; names the message.
    """
    if not isinstance(value, list):
        raise BadRowError(f"{name!r} is {short(value)}", hint="allowed are a string or a list of messages")
    if not value:
        raise BadRowError(f"{name!r} is an empty list", hint="give at least one message")
    return tuple(_message(f"{name}[{index}]", item) for index, item in enumerate(value))


def tools_of(value: Any) -> tuple[Tool, ...]:
    """Return tools from a list of JSON schemas, or from such a list as JSON text, as TRL stores it in Parquet.

    Raises:
        BadRowError: If it is neither, or a tool has no name.
    """
    value = _decoded("tools", value)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise BadRowError(f"'tools' is {short(value)}", hint="a list of JSON schemas of functions is needed")
    return tuple(_tool(f"tools[{index}]", item) for index, item in enumerate(value))


def _message(name: str, value: Any) -> Message:
    if not isinstance(value, dict) or "role" not in value or not ({"content", "tool_calls"} & value.keys()):
        raise BadRowError(f"{name!r} is {short(value)}", hint="a message has a role and a content")
    role: Any = "system" if value["role"] == "developer" else value["role"]  # OpenAI's newer name
    if role not in get_args(Role):
        raise BadRowError(f"{name!r} has the role {short(role)}", hint=f"roles are {', '.join(get_args(Role))}")
    calls = value.get("tool_calls") or []
    if calls and role != "assistant":
        raise BadRowError(f"{name!r} of the {role} has tool calls", hint="only the assistant calls tools")
    if not isinstance(calls, list):
        raise BadRowError(f"'{name}.tool_calls' is {short(calls)}", hint="a list of calls is needed")
    content = value.get("content")
    is_silent = content is None or content == ""
    return Message(
        role,
        "" if is_silent and (calls or role == "tool") else text_of(f"{name}.content", content),
        tuple(_call(f"{name}.tool_calls[{i}]", call, f"call_{i}") for i, call in enumerate(calls)),
        _optional_text(f"{name}.tool_call_id", value.get("tool_call_id")),
        _optional_text(f"{name}.name", value.get("name")) if role == "tool" else None,
    )


def _call(name: str, value: Any, default_id: str) -> ToolCall:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRowError(f"{name!r} is {short(value)}", hint="a call has a function with a name and arguments")
    arguments = _decoded(f"{name}.arguments", function.get("arguments") or function.get("args") or {})
    if not isinstance(arguments, dict):
        raise BadRowError(f"'{name}.arguments' is {short(arguments)}", hint="an object is needed")
    return ToolCall(
        _encodable(f"{name}.id", str(value.get("id") or default_id)),
        _encodable(f"{name}.name", function["name"]),
        _encodable_json(f"{name}.arguments", arguments),
    )


def _tool(name: str, value: Any) -> Tool:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRowError(f"{name!r} is {short(value)}", hint="a tool has a name, a description and parameters")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise BadRowError(f"'{name}.parameters' is {short(parameters)}", hint="a JSON schema is needed")
    return Tool(
        _encodable(f"{name}.name", function["name"]),
        _optional_text(f"{name}.description", function.get("description")) or "",
        _encodable_json(f"{name}.parameters", parameters),
    )


def _optional_text(name: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value if value is None else _encodable(name, value)
    raise BadRowError(f"{name!r} is {short(value)}", hint="a string is needed")


def _encodable(name: str, text: str) -> str:
    """Return a text; refuse halves of surrogate pairs, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(
            f"{name!r} has {text[error.start]!r} at character {error.start}, half of a surrogate pair",
            hint="no tokenizer can encode it",
        ) from None
    return text


def _encodable_json(name: str, value: dict[str, Any]) -> dict[str, Any]:
    """Return an object; refuse one that is not JSON or that has halves of surrogate pairs."""
    try:
        _encodable(name, json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError) as error:
        raise BadRowError(
            f"{name!r} is not JSON: {error}", hint="it may hold text, numbers, lists and objects"
        ) from None
    return value


def _decoded(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        raise BadRowError(f"{name!r} is not JSON: {short(value)}", hint="write it with json.dumps") from None
    if is_too_deep(found):
        raise BadRowError(f"{name!r} is nested too deep: {short(value)}", hint="no tool needs so many levels")
    return found
