"""How models write tool calls: the syntax of a chat template, the grammar of a reply in it, and its parser.

Torch-free. The grammar is a structural tag of xgrammar, as plain JSON; `engine.grammar` makes a mask of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from mara_integrations.errors import ConfigError
from mara_integrations.messages import Tool

# A small model that falls into a string does not come out again: longer ones must be asked for, by `maxLength`.
_LONGEST_STRING = 1000


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """A call is written `begin name middle arguments end`; `trigger`, its beginning, announces it in free text."""

    trigger: str
    begin: str
    middle: str
    end: str


HERMES = CallSyntax("<tool_call>", '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")
LLAMA = CallSyntax('{"name": "', '{"name": "', '", "parameters": ', "}")
MISTRAL = CallSyntax('[{"name": "', '[{"name": "', '", "arguments": ', "}]")


def syntax_of(chat_template: str | None) -> CallSyntax:
    """The syntax a template was written for; `HERMES`, in which we render tools elsewhere, where it knows none."""
    template = chat_template or ""
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if '"parameters": ' in template and "ipython" in template:
        return LLAMA
    return HERMES


@dataclass(frozen=True, slots=True)
class ReplyForm:
    """What a reply may be.

    Attributes:
        tools: What the model may call.
        tool_choice: `auto`: text or calls. `none`: text. `any`: calls alone. Else the name of the tool it must call.
        parallel: Several calls in one reply; None: in `auto` alone.
        json_schema: The reply is JSON of this schema; with tools and `auto`, that or calls.
    """

    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    parallel: bool | None = None
    json_schema: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse a choice that can't be met.

        Raises:
            ConfigError: If `tool_choice` is no tool's name.
        """
        names = [tool.name for tool in self.tools]
        if self.tool_choice not in ("auto", "none", *(("any", *names) if names else ())):
            allowed = ", ".join(["auto", "none", "any", *names]) if names else "auto, none: there are no tools"
            raise ConfigError(f"tool_choice={self.tool_choice!r} is not allowed", hint=f"allowed: {allowed}")

    @classmethod
    def of_call(cls, call: dict[str, Any]) -> ReplyForm:
        """Take the arguments that say it out of a call's, in the words of OpenAI's API, which both frameworks use.

        Raises:
            ConfigError: If one of them has a value that is not allowed.
        """
        tools = tuple(_tool(tool) for tool in call.pop("tools", None) or ())
        choice = call.pop("tool_choice", None)
        if isinstance(choice, Mapping):
            choice = choice.get("function", choice).get("name", choice.get("type"))
        schema, wanted = None, call.pop("response_format", None)
        if wanted is not None and wanted.get("type") == "json_schema":
            schema = wanted["json_schema"].get("schema", {})
        elif wanted is not None and wanted.get("type") == "json_object":
            schema = {"type": "object", "additionalProperties": True}
        elif wanted is not None and wanted.get("type") != "text":
            raise ConfigError(
                f"response_format={wanted!r} is not allowed", hint="its type is json_schema or json_object"
            )
        call.pop("strict", None)  # always
        words = {None: "auto", False: "none", True: "any", "required": "any"}
        return cls(tools, words.get(choice, choice), call.pop("parallel_tool_calls", None), schema)

    def grammar(self, syntax: CallSyntax) -> dict[str, Any] | None:
        """The structural tag of the replies that are allowed; None: any text."""
        reply = None if self.json_schema is None else _json(self.json_schema)
        if self.tools and self.tool_choice != "none":
            called = [tool for tool in self.tools if self.tool_choice in ("auto", "any", tool.name)]
            tags = [_tag(tool, syntax) for tool in called]
            if self.tool_choice == "auto" and reply is None:
                several = self.parallel is not False
                reply = {"type": "triggered_tags", "triggers": [syntax.trigger], "tags": tags}
                reply["stop_after_first"] = not several
            else:
                calls: dict[str, Any] = {"type": "or", "elements": tags}
                if self.parallel:
                    calls = {"type": "tags_with_separator", "tags": tags, "separator": "\n", "at_least_one": True}
                is_free = reply is not None and self.tool_choice == "auto"
                reply = {"type": "or", "elements": [reply, calls]} if is_free else calls
        return None if reply is None else {"type": "structural_tag", "format": reply}


def _tag(tool: Tool, syntax: CallSyntax) -> dict[str, Any]:
    begin, arguments = f"{syntax.begin}{tool.name}{syntax.middle}", _json(tool.parameters, min_length=1)
    return {"type": "tag", "begin": begin, "content": arguments, "end": syntax.end}


def _tool(tool: Mapping[str, Any]) -> Tool:
    function = tool.get("function")
    if not isinstance(function, Mapping) or "name" not in function:
        raise ConfigError(f"{tool!r} is no function", hint='give {"type": "function", "function": {"name": ...}}')
    return Tool(function["name"], function.get("description") or "", function.get("parameters") or {})


def _json(schema: Mapping[str, Any], min_length: int = 0) -> dict[str, Any]:
    schema = _bounded(schema, min_length) or {"type": "object", "properties": {}}
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": 1}


def _bounded(schema: Any, min_length: int) -> Any:
    """The schema with a bound on every string that has none; a tool's arguments are not left empty either."""
    if isinstance(schema, list):
        return [_bounded(item, min_length) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    bounded = {key: _bounded(value, min_length) for key, value in schema.items()}
    if schema.get("type") == "string" and not {"enum", "const", "pattern", "format"} & schema.keys():
        bounded.setdefault("maxLength", _LONGEST_STRING)
        bounded.setdefault("minLength", min(min_length, bounded["maxLength"]))
    return bounded


@dataclass(slots=True)
class Call:
    """One call as it was written; `arguments` is JSON, unless the reply ended inside it."""

    index: int
    id: str
    name: str
    arguments: str = ""

    @property
    def parsed(self) -> dict[str, Any] | None:
        """The arguments, once they are whole."""
        try:
            parsed = json.loads(self.arguments, strict=False)  # in free text a string may hold a raw tab
        except ValueError:
            return None
        return parsed if isinstance(parsed, dict) else None


@dataclass(slots=True)
class Piece:
    """News of a reply: text for the reader, or the next part of a call's arguments."""

    text: str = ""
    call: Call | None = None


@dataclass(slots=True)
class CallParser:
    """Parts calls from text while both are written; what may become a call is held back until that is clear."""

    syntax: CallSyntax
    calls: list[Call] = field(default_factory=list)
    _held: str = ""
    _arguments: _JSONEnd | None = None
    _to_skip: str = ""

    def push(self, text: str, *, final: bool = False) -> list[Piece]:
        """Take more text; `final`: there is no more, so what was held back is text after all."""
        self._held += text
        pieces = []
        while (piece := self._next(final)) is not None:
            if piece.text or piece.call:
                pieces.append(piece)
        return pieces

    def _next(self, final: bool) -> Piece | None:
        """One step; None: it needs more text."""
        if self._arguments is not None:
            return self._next_arguments()
        if self.calls:  # between calls and after the last, white space is nobody's text
            self._held = self._skipped(self._held).lstrip()
        if not self._held:
            return None
        start = self._held.find(self.syntax.trigger)
        if start == 0:
            header = re.match(f'{re.escape(self.syntax.begin)}([^"]+){re.escape(self.syntax.middle)}', self._held)
            if header is None:
                return self._give(len(self._held)) if final else None
            self.calls.append(Call(len(self.calls), f"call_{uuid4().hex[:24]}", header[1]))
            self._held, self._arguments = self._held[header.end() :], _JSONEnd()
            return Piece(call=replace(self.calls[-1]))
        end = start if start > 0 else len(self._held) - (0 if final else _overlap(self._held, self.syntax.trigger))
        return self._give(end) if end else None

    def _next_arguments(self) -> Piece | None:
        assert self._arguments is not None
        end = self._arguments.find(self._held)
        new, self._held = self._held[:end], self._held[end:]
        if self._arguments.is_found:
            self._arguments, self._to_skip = None, self.syntax.end
        elif not new:
            return None
        call = self.calls[-1]
        call.arguments += new
        return Piece(call=replace(call, arguments=new))

    def _skipped(self, text: str) -> str:
        """The text without the end of the last call, of which a part may have come already."""
        count = 0
        while count < min(len(text), len(self._to_skip)) and text[count] == self._to_skip[count]:
            count += 1
        self._to_skip = self._to_skip[count:] if count == len(text) else ""
        return text[count:]

    def _give(self, end: int) -> Piece:
        text, self._held = self._held[:end], self._held[end:]
        return Piece(text=text)


@dataclass(slots=True)
class _JSONEnd:
    """Finds where a JSON object ends, over any number of pieces."""

    is_found: bool = False
    _depth: int = 0
    _in_string: bool = False
    _escaped: bool = False

    def find(self, text: str) -> int:
        """How much of the text belongs to the object."""
        for place, character in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = not self._escaped and character == "\\"
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.is_found = True
                    return place + 1
        return len(text)


def _overlap(text: str, trigger: str) -> int:
    """Length of the longest end of `text` that is a beginning of `trigger`."""
    return next((n for n in range(min(len(text), len(trigger) - 1), 0, -1) if text.endswith(trigger[:n])), 0)
