"""How models write tool calls: the syntax of a chat template, the grammar of a reply in it, and its parser.

Torch-free. The grammar is a structural tag of xgrammar, as plain JSON; `engine.grammar` makes a mask of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from uuid import uuid4

from mara_integrations.errors import ConfigError
from mara_integrations.messages import Tool
from mara_integrations.reasoning import CLOSE, OPEN, Thoughts

# A small model that falls into a string does not come out again: longer ones must be asked for, by `maxLength`.
_LONGEST_STRING = 1000


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
_BARE = '{"name":'


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
    return {"type": "tag", "begin": begin, "content": _json(tool.parameters, min_length=1), "end": end}


def _tool(tool: Mapping[str, Any]) -> Tool:
    function = tool.get("function")
    if not isinstance(function, Mapping) or "name" not in function:
        raise ConfigError(f"{tool!r} is no function", hint='give {"type": "function", "function": {"name": ...}}')
    return Tool(function["name"], function.get("description") or "", function.get("parameters") or {})


def _json(schema: Mapping[str, Any], min_length: int = 0) -> dict[str, Any]:
    schema = _bounded(schema, min_length) or {"type": "object", "properties": {}}
    return {"type": "json_schema", "json_schema": schema}


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
    """One call as it was written; with an `error`, `arguments` is what can't be read, and `name` may be empty."""

    index: int
    id: str
    name: str
    arguments: str = ""
    error: str | None = None

    @property
    def parsed(self) -> dict[str, Any] | None:
        """The arguments, once they are whole."""
        return None if self.error else _object(self.arguments)


@dataclass(slots=True)
class Piece:
    """News of a reply: text for the reader, or the next part of a call's arguments."""

    text: str = ""
    call: Call | None = None


_OPENED = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_OPENED_V11 = re.compile(r"([\w.-]+)(?:\[CALL_ID\][\w-]*)?\[ARGS\]\s*(?=\{)")  # Mistral's newer form
_NAME = re.compile(r'"name"\s*:\s*"([^"\\]+)"')


@dataclass(slots=True)
class CallParser:
    """Parts calls from text while both are written; what may become a call is held back until that is clear.

    What a tag announces or what names one of the tools is a call, with an `error` if it can't be read; other JSON is
    text.

    Attributes:
        syntax: Of the model.
        names: Of the tools that it was given; with them, a reply that is a call without its tag is understood too.
        calls: Those found so far.
    """

    syntax: CallSyntax
    names: Collection[str] = ()
    calls: list[Call] = field(default_factory=list)
    _part: Literal["text", "head", "arguments", "rest", "end"] = field(default="text", init=False)
    _mark: str = field(default="", init=False)  # what began this call, as it was written
    _is_tagged: bool = field(default=False, init=False)
    _in_list: bool = field(default=False, init=False)
    _in_object: bool = field(default=False, init=False)
    _is_first: bool = field(default=True, init=False)  # no text was given yet
    _json: _JSONEnd = field(default_factory=lambda: _JSONEnd(), init=False)
    _held: str = field(default="", init=False)

    def push(self, text: str, *, final: bool = False) -> list[Piece]:
        """Take more text; `final`: there is no more, so what was held back is text after all."""
        self._held += text
        pieces: list[Piece] = []
        steps = {"text": self._text, "head": self._head, "arguments": self._arguments}
        steps.update(rest=self._rest, end=self._end)
        while (new := steps[self._part](final)) is not None:
            pieces += new
        if final and self._part == "arguments":
            self.calls[-1].error = "the reply ended inside the call"
        return pieces

    # One step of each part; None: it needs more text.

    def _text(self, final: bool) -> list[Piece] | None:
        if self.calls:  # between calls and after the last, white space is nobody's text
            self._held = self._held.lstrip()
        for place in range(len(self._held)):
            is_begin = self._is_first and not self._held[:place].strip()
            for mark in (*self.syntax.marks, *((_BARE,) if self.names and is_begin else ())):
                end = _match(self._held, place, mark)
                if end is None and not final:
                    return self._give(place) or None
                if end:
                    return [*self._give(place), *self._begin(mark, end - place)]
        return self._give(len(self._held)) or None

    def _begin(self, mark: str, length: int) -> list[Piece]:
        self._in_list = mark.startswith("[{")
        self._is_tagged = not self._in_list and not mark.startswith("{")
        length = length if self._is_tagged else int(self._in_list)
        self._mark, self._held, self._part = self._held[:length], self._held[length:], "head"
        return []

    def _head(self, final: bool) -> list[Piece] | None:
        self._skip(r"\s*\[?\s*" if self._is_tagged and not self.syntax.close and not self._in_list else r"\s*")
        self._in_list = self._in_list or (self._is_tagged and "[" in self._mark[1:])
        header = _OPENED.match(self._held)
        self._in_object = header is not None
        if header is None and self._is_tagged:
            header = _OPENED_V11.match(self._held)
        if header is not None and self._may_be(header[1]):
            self._held, self._json, self._part = self._held[header.end() :], _JSONEnd(), "arguments"
            return [self._open(header[1])]
        end = self._end_of_body()
        if end is None and not final:
            return None
        body, self._held = self._held[:end], self._held[len(self._held) if end is None else end :]
        self._part = "end"
        call, name = _call_of(body, self._is_tagged), _NAME.search(body)
        if call is not None and self._may_be(call[0]):
            return [self._open(call[0]), self._add(call[1])]
        is_meant = end is not None or body.startswith("{") if self._is_tagged else name and name[1] in self.names
        if is_meant:
            opened, rest = self._open(name[1] if name else ""), self._add(body)
            self.calls[-1].error = "the reply ended inside the call" if end is None else "the call is not valid JSON"
            return [opened, rest]
        self._held, self._part = f"{self._mark}{body}{self._held}", "text"
        return self._give(len(self._mark) + len(body))

    def _arguments(self, final: bool) -> list[Piece] | None:
        end = self._json.find(self._held)
        new, self._held = self._held[:end], self._held[end:]
        pieces = [self._add(new)] if new else None
        if self._json.is_over:
            self._part = "rest" if self._in_object else "end"
            if self.calls[-1].parsed is None:
                self.calls[-1].error = "the arguments are not valid JSON"
            self._json = _JSONEnd(depth=1)
        return pieces

    def _rest(self, final: bool) -> list[Piece] | None:
        self._held = self._held[self._json.find(self._held) :]
        if not self._json.is_over:
            return None
        self._part = "end"
        return []

    def _end(self, final: bool) -> list[Piece] | None:
        self._held, close = self._held.lstrip(), self.syntax.close if self._is_tagged else ""
        if not self._held:
            return None
        if self._in_list and self._held[0] in ",]":
            self._in_list = self._held[0] == ","
            self._mark, self._held, self._part = "", self._held[1:], "head" if self._in_list else "end"
        elif close and close.startswith(self._held) and close != self._held:
            if not final:
                return None
            self._held, self._part = "", "text"
        else:
            self._held, self._part = self._held.removeprefix(close).removeprefix(";"), "text"
        return []

    def _end_of_body(self) -> int | None:
        if self._held.startswith("{"):
            json_end = _JSONEnd()
            end = json_end.find(self._held)
            return end if json_end.is_over else None
        end = self._held.find(self.syntax.close) if self.syntax.close else -1
        return end if end >= 0 else None

    def _may_be(self, name: str) -> bool:
        return self._is_tagged or not self.names or name in self.names

    def _skip(self, pattern: str) -> None:
        """Move what matches to the mark, of which it is given back with it."""
        matched = re.match(pattern, self._held)
        assert matched is not None
        self._mark, self._held = self._mark + matched[0], self._held[matched.end() :]

    def _open(self, name: str) -> Piece:
        self.calls.append(Call(len(self.calls), f"call_{uuid4().hex[:24]}", name))
        return Piece(call=replace(self.calls[-1]))

    def _add(self, arguments: str) -> Piece:
        self.calls[-1].arguments += arguments
        return Piece(call=replace(self.calls[-1], arguments=arguments))

    def _give(self, end: int) -> list[Piece]:
        text, self._held = self._held[:end], self._held[end:]
        self._is_first = self._is_first and not text.strip()
        return [Piece(text=text)] if text else []


@dataclass(slots=True)
class _JSONEnd:
    """Finds where a JSON object ends, over any number of pieces; a tag outside a string ends it too."""

    depth: int = 0
    is_over: bool = False
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
                self.depth += 1
            elif character == "<":
                self.is_over = True
                return place
            elif character in "}]":
                self.depth -= 1
                if self.depth == 0:
                    self.is_over = True
                    return place + 1
        return len(text)


def _match(text: str, place: int, mark: str) -> int | None:
    """Where the mark ends that begins at `place`; 0: none does. None: the text ends inside it."""
    end = place
    for character in mark:
        while place < end < len(text) and character in '{":' and text[end].isspace():  # as JSON allows
            end += 1
        if end == len(text):
            return None
        if text[end] != character:
            return 0
        end += 1
    return end


def _object(text: str) -> dict[str, Any] | None:
    try:
        loaded = json.loads(text, strict=False)  # in free text a string may hold a raw tab
    except (ValueError, RecursionError):
        return None
    return loaded if isinstance(loaded, dict) else None


def _call_of(body: str, is_tagged: bool) -> tuple[str, str] | None:
    """Name and arguments of a call whose JSON is in another order or form than usual."""
    call = _object(body) or {}
    call = call["function"] if isinstance(call.get("function"), dict) else call
    arguments = call.get("arguments", call.get("parameters", {} if is_tagged else None))
    if isinstance(arguments, str):
        arguments = _object(arguments)
    if not isinstance(call.get("name"), str) or not call["name"] or not isinstance(arguments, dict):
        return None
    return call["name"], json.dumps(arguments, ensure_ascii=False)
