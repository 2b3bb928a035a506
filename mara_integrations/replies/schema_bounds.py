"""Bounds on the JSON schemas that replies are held to, checked before anything costly is done with them.

A schema is a program: one of 150 bytes can ask for a string of a million characters, or for an object that never ends.
What passes here becomes a grammar in seconds, and every reply that it asks for can come to its end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from mara_integrations.errors import ConfigError
from mara_integrations.replies.pattern_bounds import pattern_bounds

# Of all schemas of a request together. OpenAI's API has limits of the same kind.
MAX_BYTES = 256 << 10
MAX_SCHEMAS = 5_000  # schemas inside schemas
MAX_REPEATS = 2_000  # characters of all patterns, their repetitions written out: compiling them is the costliest
MAX_LENGTHS = 32  # different bounds of strings: each takes a second and some megabytes
# Of one schema.
MAX_DEPTH = 128  # lists and objects inside one another
MAX_PROPERTIES = 500
MAX_AT_LEAST = 256  # minItems, minProperties
MAX_SHORTEST = 8_192  # characters of the shortest reply
MAX_PATTERN = 1_000  # characters of a pattern

_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_ONE = ("items", "additionalProperties", "unevaluatedProperties", "propertyNames", "contains", "additionalItems")
_MANY = ("prefixItems", "anyOf", "oneOf", "allOf", "items")
_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf", "required", "enum")
_NAMED = ("properties", "patternProperties")


@dataclass(slots=True)
class SchemaBounds:
    """Checks schemas one by one, and what they cost together."""

    _num_bytes: int = 0
    _num_schemas: int = 0
    _num_repeats: int = 0
    _lengths: set[int] = field(default_factory=set)

    def check(self, schema: Any, what: str) -> None:
        """Refuse a schema that is not JSON, that costs too much to compile, or that no reply can fulfil.

        Args:
            schema: The schema.
            what: The owner of the schema, for the error.

        Raises:
            ConfigError: If a bound is exceeded; it names the place, the value and the bound.
        """
        if not isinstance(schema, Mapping):
            raise ConfigError(f"{what} is {_shown(schema)}", hint="a JSON schema is an object")
        _check_depth(schema, what)
        self._num_bytes += len(_dumped(schema, what))
        self._check_total("bytes", self._num_bytes, MAX_BYTES, what)
        nodes = list(_reachable(schema, MAX_SCHEMAS + 1))
        self._num_schemas += len(nodes)
        self._check_total("schemas inside schemas", self._num_schemas, MAX_SCHEMAS, what)
        shortest_patterns = {id(node): self._check_node(node, f"{what}, {path}") for path, node in nodes}
        _check_shortest(schema, nodes, shortest_patterns, what)

    def _check_node(self, node: Mapping[str, Any], where: str) -> int:
        """Check the values of a schema's keywords; returns the characters of the shortest text of its patterns."""
        for keyword in _COUNTS:
            if keyword in node:
                _check_count(node[keyword], keyword, where)
        for keyword in ("minItems", "minProperties"):
            if node.get(keyword, 0) > MAX_AT_LEAST:
                raise ConfigError(f"{where}: {keyword} is {node[keyword]}", hint=f"at most {MAX_AT_LEAST}")
        for keyword in _LISTS:
            if not isinstance(node.get(keyword, []), list | tuple):
                raise ConfigError(f"{where}: {keyword} is {_shown(node[keyword])}", hint="it is a list")
        for keyword in _NAMED:
            named = node.get(keyword, {})
            if not isinstance(named, Mapping):
                raise ConfigError(f"{where}: {keyword} is {_shown(named)}", hint="it maps names to schemas")
            if len(named) > MAX_PROPERTIES:
                raise ConfigError(f"{where}: {len(named)} {keyword} are too many", hint=f"at most {MAX_PROPERTIES}")
        if "maxLength" in node:
            self._lengths.add(node["maxLength"])
            self._check_total("different values of maxLength", len(self._lengths), MAX_LENGTHS, where)
        shortest = 0
        for pattern in [*([node["pattern"]] if "pattern" in node else ()), *node.get("patternProperties", ())]:
            if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN:
                raise ConfigError(
                    f"{where}: the pattern is {_shown(pattern)}", hint=f"a string of at most {MAX_PATTERN} characters"
                )
            shortest, repeats = pattern_bounds(pattern)
            self._num_repeats += repeats
            self._check_total(f"characters of patterns ({_shown(pattern)})", self._num_repeats, MAX_REPEATS, where)
        return shortest if "pattern" in node else 0

    def _check_total(self, what: str, count: int, most: int, where: str) -> None:
        if count > most:
            raise ConfigError(f"{where}: with it, the request has {count} {what}", hint=f"at most {most:,}")


def _check_depth(schema: Any, what: str) -> None:
    """Refuse what is nested too deep, with a stack of our own: Python's is not deep enough to find that out."""
    level, count = [schema], 0
    for _ in range(MAX_DEPTH):
        children = [value for each in level for value in (each.values() if isinstance(each, Mapping) else each)]
        level = [child for child in children if isinstance(child, Mapping | list | tuple)]
        count += len(children)
        if not level:
            return
        if count > MAX_BYTES:  # each takes a byte at least
            raise ConfigError(f"{what} is larger than {MAX_BYTES:,} bytes")
    raise ConfigError(f"{what} is nested deeper than {MAX_DEPTH} levels")


def _dumped(schema: Any, what: str) -> bytes:
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:  # also of characters that are halves of a pair
        raise ConfigError(f"{what} is not JSON: {error}") from None


def _check_count(value: Any, keyword: str, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{where}: {keyword} is {_shown(value)}", hint="a whole number, 0 or more")


def _children(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the schemas that a reply may have to follow, with their places; unused definitions are left out."""
    for keyword in _ONE:
        yield keyword, node.get(keyword)
    for keyword in _MANY:
        if isinstance(node.get(keyword), Sequence) and not isinstance(node[keyword], str):
            yield from ((f"{keyword}/{index}", each) for index, each in enumerate(node[keyword]))
    for keyword in _NAMED:
        if isinstance(node.get(keyword), Mapping):
            yield from ((f"{keyword}/{name}", each) for name, each in node[keyword].items())


def _reachable(root: Mapping[str, Any], most: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the first `most` schemas that a reply may have to follow, each once, with its place."""
    waiting, seen = [("#", root)], set[int]()
    while waiting and len(seen) < most:
        path, node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield path, node
        target = _target(root, node)
        children = [("$ref", target), *_children(node)] if target is not None else list(_children(node))
        waiting += [(f"{path}/{place:.60}", child) for place, child in children if isinstance(child, Mapping)]


def _target(root: Mapping[str, Any], node: Mapping[str, Any]) -> Any:
    """Return what a schema refers to inside the whole schema; None if there is nothing."""
    pointer = node.get("$ref")
    if not isinstance(pointer, str) or not pointer.startswith("#"):
        return None
    found: Any = root
    for part in pointer[1:].split("/")[1:]:
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found


def _check_shortest(
    root: Mapping[str, Any], nodes: list[tuple[str, Mapping[str, Any]]], patterns: Mapping[int, int], what: str
) -> None:
    """Refuse a schema whose shortest reply is too long, or endless.

    The shortest reply to each schema inside is found from those to its parts, again and again until none gets shorter.
    """
    shortest = {id(node): math.inf for _, node in nodes}
    for _ in range(MAX_DEPTH):
        before = dict(shortest)
        for _, node in reversed(nodes):  # parts come after what they are part of
            shortest[id(node)] = _shortest(root, node, shortest, patterns[id(node)])
        if shortest == before:
            break
    for path, node in nodes:
        if shortest[id(node)] == math.inf:
            raise ConfigError(
                f"{what}, {path}: no value of this schema is finite",
                hint="a property that must hold its own schema again never ends: leave it out of `required`",
            )
        if shortest[id(node)] > MAX_SHORTEST:
            raise ConfigError(
                f"{what}, {path}: its shortest value has {shortest[id(node)]:,.0f} characters",
                hint=f"at most {MAX_SHORTEST:,}",
            )


def _shortest(root: Mapping[str, Any], node: Mapping[str, Any], shortest: Mapping[int, float], pattern: int) -> float:
    """Characters of the shortest value of a schema, given those of its parts; inf: none is known yet."""

    def of(part: Any) -> float:
        if isinstance(part, Mapping):
            return shortest.get(id(part), 1)
        return math.inf if part is False else 1

    if "$ref" in node:
        target = _target(root, node)
        return 1 if target is None else of(target)
    if "const" in node:
        return len(json.dumps(node["const"], ensure_ascii=False))
    if "enum" in node:
        return min((len(json.dumps(value, ensure_ascii=False)) for value in node["enum"]), default=math.inf)
    length = 0.0
    for keyword in ("anyOf", "oneOf"):
        if keyword in node:
            length += min((of(part) for part in node[keyword]), default=math.inf)
    if "allOf" in node:
        length += sum(of(part) for part in node["allOf"])
    given = node.get("type")
    kinds = given if isinstance(given, list) else [given or _kind(node)]
    return length + min((_shortest_of_kind(kind, node, of, pattern) for kind in kinds), default=0)


def _kind(node: Mapping[str, Any]) -> str | None:
    """Return the type of a schema that names none."""
    for kind, keywords in (("object", ("properties", "required")), ("array", ("items", "prefixItems"))):
        if any(keyword in node for keyword in keywords):
            return kind
    return "string" if "pattern" in node else None


def _shortest_of_kind(kind: Any, node: Mapping[str, Any], of: Callable[[Any], float], pattern: int) -> float:
    if kind == "string":
        return 2.0 + max(int(node.get("minLength", 0)), pattern)
    if kind == "array":
        first = node.get("prefixItems") or []
        rest = max(int(node.get("minItems", 0)) - len(first), 0)
        return 2 + sum(2 + of(part) for part in first) + (rest * (2 + of(node.get("items"))) if rest else 0)
    if kind == "object":
        properties, required = node.get("properties") or {}, node.get("required") or ()
        held = sum(len(str(name)) + 6 + of(properties.get(name)) for name in required if isinstance(name, str))
        return 2.0 + held + 8 * max(int(node.get("minProperties", 0)) - len(required), 0)
    return 1


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
