"""The form that a reply must take: tool calls in the syntax of the model's family, or an object of a schema."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mara_integrations.errors import ConfigError
from mara_integrations.messages import Tool
from mara_integrations.replies.reasoning import CLOSE, OPEN, Thoughts
from mara_integrations.replies.schema_bounds import SchemaBounds


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """A call is written `begin name middle arguments end`; `trigger`, its beginning, announces it in free text.

    `lead` stands before one that must be made; in free text a model may leave it out, or write it otherwise. `marks`
    are all beginnings by which a call is recognised: models are less exact than grammars. `close` ends a call that a
    tag began. `inner` are tags inside it.
    """

    trigger: str
    begin: str
    middle: str
    end: str
    marks: tuple[str, ...]
    close: str = ""
    lead: str = ""
    inner: tuple[str, ...] = ()

    @property
    def tags(self) -> tuple[str, ...]:
        """What may be a special token of the tokenizer, and yet has to be read."""
        return (*self.marks, self.close, *self.inner)


# A mark that begins with a bracket is JSON itself; white space between its parts does not matter.
HERMES = CallSyntax(
    "<tool_call>",
    '<tool_call>\n{"name": "',
    '", "arguments": ',
    "}\n</tool_call>",
    marks=("<tool_call>",),
    close="</tool_call>",
)


LLAMA = CallSyntax('{"name": "', '{"name": "', '", "parameters": ', "}", marks=("<|python_tag|>", '{"name":'))
MISTRAL = CallSyntax(
    '[{"name": "',
    '[{"name": "',
    '", "arguments": ',
    "}]",
    marks=("[TOOL_CALLS]", '[{"name":'),
    lead="[TOOL_CALLS] ",
    inner=("[ARGS]", "[CALL_ID]"),
)


# Since Mistral Small 3.1: nothing but the whole beginning announces a call
MISTRAL_V11 = replace(MISTRAL, trigger="", begin="", middle="[ARGS]", end="", lead="[TOOL_CALLS]")
# What a model writes that was shown tools and forgot the tags.
BARE_CALL = '{"name":'


def syntax_of(chat_template: str | None) -> CallSyntax:
    """The syntax a template was written for; `HERMES`, in which we render tools elsewhere, where it knows none."""
    template = chat_template or ""
    if "[TOOL_CALLS]" in template:
        return MISTRAL_V11 if "[ARGS]" in template else MISTRAL
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
        """Refuse a choice that can't be met, and schemas beyond `SchemaBounds`.

        Raises:
            ConfigError: If `tool_choice` is no tool's name, or a schema or a name is not allowed.
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
        choice = words.get(choice, choice)
        if choice == "none":  # a small model that sees tools calls them, told not to or not
            tools = ()
        return cls(tools, choice, call.pop("parallel_tool_calls", None), schema)

    @property
    def is_free(self) -> bool:
        """Whether a reply may begin with any text."""
        return self.json_schema is None and (not self.tools or self.tool_choice in ("auto", "none"))

    def grammar(self, syntax: CallSyntax, thoughts: Thoughts = "none") -> dict[str, Any] | None:
        """The structural tag of the replies that are allowed, after thoughts of any length; None: any text."""
        reply = None if self.json_schema is None else _json(self.json_schema)
        if self.tools and self.tool_choice != "none":
            called = [tool for tool in self.tools if self.tool_choice in ("auto", "any", tool.name)]
            begins = [f"{syntax.begin}{tool.name}{syntax.middle}" for tool in called]
            tags = [_tag(begin, tool, syntax.end) for begin, tool in zip(begins, called, strict=True)]
            if self.tool_choice == "auto" and reply is None:
                several = self.parallel is not False
                reply = {
                    "type": "triggered_tags",
                    "triggers": [syntax.trigger] if syntax.trigger else begins,
                    "tags": tags,
                }
                reply["stop_after_first"] = not several
            else:
                tags = [{**tag, "begin": f"{syntax.lead}{tag['begin']}"} for tag in tags]
                calls: dict[str, Any] = {"type": "or", "elements": tags}
                if self.parallel:
                    calls = {"type": "tags_with_separator", "tags": tags, "separator": "\n", "at_least_one": True}
                is_free = reply is not None and self.tool_choice == "auto"
                reply = {"type": "or", "elements": [reply, calls]} if is_free else calls
        if reply is not None and not self.is_free:
            reply = _after_thoughts(reply, thoughts)
        return None if reply is None else {"type": "structural_tag", "format": reply}


def _after_thoughts(reply: dict[str, Any], thoughts: Thoughts) -> dict[str, Any]:
    if thoughts == "none":
        return reply
    begin = OPEN if thoughts == "possible" else ""
    tag = {"type": "tag", "begin": begin, "content": {"type": "any_text"}, "end": CLOSE}
    lines = {"type": "grammar", "grammar": 'root ::= "\\n"{0,2}'}
    thought_out = {"type": "sequence", "elements": [tag, lines, reply]}
    return thought_out if thoughts == "begun" else {"type": "or", "elements": [thought_out, reply]}


def _tag(begin: str, tool: Tool, end: str) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": _json(tool.parameters), "end": end}


def _tool(tool: Mapping[str, Any]) -> Tool:
    function = tool.get("function")
    if not isinstance(function, Mapping) or "name" not in function:
        raise ConfigError(f"{tool!r} is no function", hint='give {"type": "function", "function": {"name": ...}}')
    return Tool(function["name"], function.get("description") or "", function.get("parameters") or {})


_TOOL_NAME = re.compile(r'[^\s"\\<>\x00-\x1f](?:[^"\\<>\x00-\x1f]{0,254}[^\s"\\<>\x00-\x1f])?')


def _check_tool(tool: Tool, bounds: SchemaBounds) -> None:
    if not isinstance(tool.name, str) or not _TOOL_NAME.fullmatch(tool.name):
        raise ConfigError(
            f"the tool name {tool.name!r:.80} is not allowed",
            hint="1 to 256 characters, without quotes, angle brackets, backslashes and control characters",
        )
    if not isinstance(tool.description, str):
        raise ConfigError(f"the description of tool {tool.name!r} is {tool.description!r:.80}", hint="it is a string")
    bounds.check({"title": tool.name, "description": tool.description}, f"tool {tool.name!r}")
    if tool.parameters:
        bounds.check(tool.parameters, f"the parameters of tool {tool.name!r}")


def _json(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": schema or {"type": "object", "properties": {}}}
