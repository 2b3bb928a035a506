"""The form that a reply must take: tool calls as the model's family writes them, or an object of a schema."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mara_integrations.errors import ConfigError
from mara_integrations.messages import Tool
from mara_integrations.replies import harmony
from mara_integrations.replies.families import CallFamily, schema_of
from mara_integrations.replies.reasoning import CLOSE, OPEN, Thoughts
from mara_integrations.replies.schema_bounds import SchemaBounds


@dataclass(frozen=True, slots=True)
class ReplyForm:
    """The form of a reply.

    Attributes:
        tools: Functions that the model may call.
        tool_choice: `auto` allows text and calls, `none` text, `any` calls alone. The name of a tool demands its call.
        parallel: Whether a reply may make several calls; None allows it in `auto` alone.
        json_schema: Schema of the JSON that the reply must be; with tools and `auto`, it may be calls instead.
    """

    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    parallel: bool | None = None
    json_schema: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse a choice that names an unknown tool, and schemas beyond `SchemaBounds`.

        Raises:
            ConfigError: If `tool_choice` is not a tool's name, or a schema or a name is not allowed.
        """
        bounds = SchemaBounds()
        for tool in self.tools:
            _check_tool(tool, bounds)
        if self.json_schema is not None:
            bounds.check(self.json_schema, "the schema of the reply")
        names = [tool.name for tool in self.tools]
        if self.tool_choice not in ("auto", "none", *(("any", *names) if names else ())):
            allowed = ", ".join(["auto", "none", "any", *names]) if names else "auto, none: there are no tools"
            raise ConfigError(f"tool_choice={self.tool_choice!r} is not allowed", hint=f"allowed: {allowed}")

    @classmethod
    def of_call(cls, call: dict[str, Any]) -> ReplyForm:
        """Pop the OpenAI-style tool and format arguments from `call`, and build a form of them.

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
        choice = words.get(choice, choice)
        if choice == "none":  # a small model that sees tools calls them, told not to or not
            tools = ()
        return cls(tools, choice, call.pop("parallel_tool_calls", None), schema)

    @property
    def is_free(self) -> bool:
        """Return whether a reply may begin with any text."""
        return self.json_schema is None and (not self.tools or self.tool_choice in ("auto", "none"))

    def grammar(self, family: CallFamily, thoughts: Thoughts = "none") -> dict[str, Any] | None:
        """Return the structural tag of the replies that are allowed; None: any text.

        Args:
            family: How the model writes calls.
            thoughts: Whether a reply may begin with thoughts, or begins inside of them; they may have any length.

        Raises:
            MissingExtraError: If xgrammar is not installed.
        """
        answer = None if self.json_schema is None else _json(self.json_schema)
        called: list[Tool] = []
        if self.tool_choice != "none":
            called = [tool for tool in self.tools if self.tool_choice in ("auto", "any", tool.name)]
        if answer is None and not called:
            return None
        if family.name == "harmony":
            if called:
                answer = (answer or {"type": "any_text"}) if self.tool_choice == "auto" else None
            reply = harmony.reply_format([(tool.name, schema_of(tool)) for tool in called], answer)
        else:
            reply = _after_thoughts(self._reply(family, called, answer), thoughts)
        return {"type": "structural_tag", "format": reply}

    def _reply(self, family: CallFamily, called: list[Tool], answer: dict[str, Any] | None) -> dict[str, Any]:
        if not called:
            assert answer is not None
            return answer
        if self.tool_choice == "auto" and answer is None:
            return family.free(called, several=self.parallel is not False)
        calls = family.calls(called, several=bool(self.parallel))
        is_either = answer is not None and self.tool_choice == "auto"
        return {"type": "or", "elements": [answer, calls]} if is_either else calls


def _after_thoughts(reply: dict[str, Any], thoughts: Thoughts) -> dict[str, Any]:
    if thoughts == "none":
        return reply
    begin = OPEN if thoughts == "possible" else ""
    tag = {"type": "tag", "begin": begin, "content": {"type": "any_text"}, "end": CLOSE}
    lines = {"type": "grammar", "grammar": 'root ::= "\\n"{0,2}'}
    thought_out = {"type": "sequence", "elements": [tag, lines, reply]}
    return thought_out if thoughts == "begun" else {"type": "or", "elements": [thought_out, reply]}


def _tool(tool: Mapping[str, Any]) -> Tool:
    function = tool.get("function")
    if not isinstance(function, Mapping) or "name" not in function:
        raise ConfigError(f"{tool!r} is not a function", hint='give {"type": "function", "function": {"name": ...}}')
    return Tool(function["name"], function.get("description") or "", function.get("parameters") or {})


_TOOL_NAME = re.compile(r'[^\s"\\<>\x00-\x1f](?:[^"\\<>\x00-\x1f]{0,254}[^\s"\\<>\x00-\x1f])?')


def _check_tool(tool: Tool, bounds: SchemaBounds) -> None:
    if not isinstance(tool.name, str) or not _TOOL_NAME.fullmatch(tool.name):
        raise ConfigError(
            f"the tool name {tool.name!r:.80} is not allowed",
            hint="1 to 256 characters, without quotes, angle brackets, backslashes and control characters",
        )
    if not isinstance(tool.description, str):
        raise ConfigError(f"the description of tool {tool.name!r} is {tool.description!r:.80}", hint="give a string")
    bounds.check({"title": tool.name, "description": tool.description}, f"tool {tool.name!r}")
    if tool.parameters:
        bounds.check(tool.parameters, f"the parameters of tool {tool.name!r}")


def _json(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": schema or {"type": "object", "properties": {}}}
