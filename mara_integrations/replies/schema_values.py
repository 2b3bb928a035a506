"""Read an argument that was written without quotes: as text or as JSON, by its schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Words of JSON as models that write Python spell them.
_PYTHON = {"True": True, "False": False, "None": None}
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array"}
_MAX_DEPTH = 32  # references and alternatives inside one another


def value_of(text: str, parameters: Mapping[str, Any], name: str, *, is_text: bool | None = None) -> Any:
    """Return the value of an argument.

    Args:
        text: The argument as it was written.
        parameters: The JSON schema of all arguments.
        name: Name of the argument.
        is_text: Whether the reply declares it to be text; None if it declares nothing and the schema decides. JSON goes
            first where both are allowed, but a JSON string is text: its quotes belong to it.

    Returns:
        The value; the text itself if it is not JSON.
    """
    if is_text:
        return text
    value = _json(text)
    if is_text is False:
        return value
    if isinstance(value, str):
        return text
    schema = parameters.get("properties", {}).get(name)
    allowed = None if not isinstance(schema, Mapping) else _types(schema, parameters, _MAX_DEPTH)
    kind = _TYPES.get(type(value), "object")
    if allowed is None or "string" not in allowed:
        return value
    return value if kind in allowed or (kind == "integer" and "number" in allowed) else text


def _json(text: str) -> Any:
    written = text.strip()
    if written in _PYTHON:
        return _PYTHON[written]
    try:
        return json.loads(written)
    except (ValueError, RecursionError):
        return text


def _types(schema: Mapping[str, Any], root: Mapping[str, Any], depth: int) -> set[str] | None:
    """Return the types that a schema allows; None: any."""
    if depth == 0:
        return None
    if isinstance(schema.get("$ref"), str):
        schema = _referred(schema["$ref"], root)
        return _types(schema, root, depth - 1)
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]]
        return {_TYPES.get(type(value), "object") for value in values}
    for alternatives in ("anyOf", "oneOf"):
        if isinstance(schema.get(alternatives), list):
            kinds = [_types(each, root, depth - 1) for each in schema[alternatives] if isinstance(each, Mapping)]
            return None if None in kinds else set().union(*[kind for kind in kinds if kind])
    if isinstance(schema.get("allOf"), list) and "type" not in schema:
        kinds = [_types(each, root, depth - 1) for each in schema["allOf"] if isinstance(each, Mapping)]
        return next((kind for kind in kinds if kind is not None), None)
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    return set(kind) if isinstance(kind, list) else None


def _referred(reference: str, root: Mapping[str, Any]) -> Mapping[str, Any]:
    value: Any = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        value = value.get(part.replace("~1", "/").replace("~0", "~"), {}) if isinstance(value, Mapping) else {}
    return value if isinstance(value, Mapping) else {}
