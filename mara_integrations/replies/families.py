"""Families of models by the way they write tool calls: structural tags of their replies, and readers of the calls.

Families go by xgrammar's names, and their tags are xgrammar's. Two are our own: Mistral's, which it lacks, and those of
gpt-oss, whose calls end with a token that ends the reply.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mara_integrations.errors import MissingExtraError
from mara_integrations.messages import Tool
from mara_integrations.replies import harmony
from mara_integrations.replies.calls import CallReader
from mara_integrations.replies.marked_calls import CallMarks, MarkedCallReader
from mara_integrations.replies.tool_calls import CallParser, JSONMarks

Format = dict[str, Any]  # a format of xgrammar's structural tags, as plain JSON

# White space that a tagged argument may have around it; without a bound a small model goes on for ever.
_MAX_WHITE_SPACE = 2


@dataclass(frozen=True, slots=True)
class CallFamily:
    """The form of one family's calls.

    Attributes:
        name: Name of the family in xgrammar.
        tags: Marks that may be special tokens of the tokenizer, and are still part of the text.
        marks: Marks by which calls are found; None for gpt-oss, whose whole reply is in its own form.
        between: Text between two calls.
        end: A token that ends a reply after a call.
        trigger: For families that xgrammar does not know: what announces a call in free text, if not its beginning.
        own_tags: For the same families: tags of calls, one for each tool, in free text (True) or without text (False).
    """

    name: str
    tags: tuple[str, ...]
    marks: JSONMarks | CallMarks | None
    between: str = ""
    end: str | None = None
    trigger: str = ""
    own_tags: Callable[[Sequence[Tool], bool], list[Format]] | None = field(default=None, repr=False)

    def reader(self, tools: Sequence[Tool]) -> CallReader:
        """Return the reader of the calls of one reply, given the tools of its request."""
        if isinstance(self.marks, CallMarks):
            return MarkedCallReader(self.marks, tools)
        assert self.marks is not None
        return CallParser(self.marks, [tool.name for tool in tools])

    def free(self, tools: Sequence[Tool], *, several: bool) -> Format:
        """Return the format of text in which calls may stand.

        Raises:
            MissingExtraError: If xgrammar is not installed.
        """
        if self.own_tags is None:
            return _built_in(self.name, tools, "auto", several)
        tags = self.own_tags(tools, True)
        triggers = [self.trigger] if self.trigger else [tag["begin"] for tag in tags]
        return {"type": "triggered_tags", "triggers": triggers, "tags": tags, "stop_after_first": not several}

    def calls(self, tools: Sequence[Tool], *, several: bool) -> Format:
        """Return the format of one call, or of several, without text beside them; see `free` for errors."""
        if self.own_tags is not None:
            tags = self.own_tags(tools, False)
        elif not several:
            tags = [_built_in(self.name, [tool], "forced", False) for tool in tools]
        else:
            reply = _built_in(self.name, tools, "required", True)
            if reply["type"] != "triggered_tags":
                return reply
            tags = reply["tags"]
        if not several:
            return {"type": "or", "elements": tags}
        return {"type": "tags_with_separator", "tags": tags, "separator": self.between, "at_least_one": True}


def _built_in(name: str, tools: Sequence[Tool], choice: Literal["auto", "required", "forced"], several: bool) -> Format:
    """Return xgrammar's format of an answer; thoughts before it are `ReplyForm`'s."""
    try:
        from xgrammar import get_model_structural_tag
    except ImportError:
        raise MissingExtraError(
            "tools and JSON schemas need the package xgrammar", hint="pip install 'mara-integrations[tools]'"
        ) from None
    wanted: Any = {"type": "function", "function": {"name": tools[0].name}} if choice == "forced" else choice
    tag = get_model_structural_tag(
        name,
        tools=[{"type": "function", "function": {"name": tool.name, "parameters": schema_of(tool)}} for tool in tools],
        tool_choice=wanted,
        reasoning="disabled",
        exclude_special_tokens=False,
        max_whitespace_cnt=_MAX_WHITE_SPACE,
        parallel_tool_calls=several,
    )
    reply: Format = _with_short_numbers(tag.format.model_dump(mode="json"))
    if name == "minimax":  # which writes that it does not think
        reply = reply["elements"][-1]
    return reply


def _with_short_numbers(form: Any) -> Any:
    """Bound the numbers that Kimi gives to calls: a small model would write digits for ever."""
    if isinstance(form, list):
        return [_with_short_numbers(each) for each in form]
    if not isinstance(form, dict):
        return form
    if form.get("type") == "regex" and form["pattern"] == r"\d+":
        return {**form, "pattern": r"\d{1,3}"}
    return {key: value if key == "json_schema" else _with_short_numbers(value) for key, value in form.items()}


def schema_of(tool: Tool) -> Mapping[str, Any]:
    """Return the schema of a tool's arguments; without one, it takes none."""
    return tool.parameters or {"type": "object", "properties": {}}


def _tag(begin: str, tool: Tool, end: str) -> Format:
    return {
        "type": "tag",
        "begin": begin,
        "content": {"type": "json_schema", "json_schema": schema_of(tool)},
        "end": end,
    }


def _mistral_tags(tools: Sequence[Tool], is_free: bool) -> list[Format]:
    lead = "" if is_free else "[TOOL_CALLS] "
    return [_tag(f'{lead}[{{"name": "{tool.name}", "arguments": ', tool, "}]") for tool in tools]


def _mistral_v11_tags(tools: Sequence[Tool], is_free: bool) -> list[Format]:
    lead = "" if is_free else "[TOOL_CALLS]"  # in free text nothing but the whole beginning announces a call
    return [_tag(f"{lead}{tool.name}[ARGS]", tool, "") for tool in tools]


_HERMES = JSONMarks(("<tool_call>",), "</tool_call>")
_HERMES_TAGS = ("<tool_call>", "</tool_call>")
_MISTRAL = JSONMarks(("[TOOL_CALLS]", '[{"name":'))
_MISTRAL_TAGS = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
_QWEN = CallMarks(
    ("<tool_call>", "<function="),
    re.compile(r"(?:<tool_call>\s*)?<function=(?P<name>[^>\n]+)>"),
    "</function>",
    ("</tool_call>",),
    re.compile(r"\s*<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>", re.DOTALL),
)
_GLM = CallMarks(
    ("<tool_call>",),
    re.compile(r"<tool_call>\s*(?P<name>[^<\n]+?)\s*(?=<arg_key>|</tool_call>)"),
    "</tool_call>",
    (),
    re.compile(r"\s*<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>", re.DOTALL),
)
_MINIMAX = CallMarks(
    ('<invoke name="',),
    re.compile(r'<invoke name="(?P<name>[^"\n]+)">'),
    "</invoke>",
    ("<minimax:tool_call>", "</minimax:tool_call>"),
    re.compile(r'\s*<parameter name="(?P<key>[^"\n]+)">(?P<value>.*?)</parameter>', re.DOTALL),
)
_DEEPSEEK_AROUND = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK_TAGS = (*_DEEPSEEK_AROUND, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>")


def _dsml(around: str, space: str = "") -> CallMarks:
    """Marks of DeepSeek's markup; `space` stands before the names of all tags."""
    tag = f"｜DSML｜{space}"
    return CallMarks(
        (f'<{tag}invoke name="',),
        re.compile(rf'<{tag}invoke name="(?P<name>[^"\n]+)">'),
        f"</{tag}invoke>",
        (f"<{tag}{around}>", f"</{tag}{around}>"),
        re.compile(
            rf'\s*<{tag}parameter name="(?P<key>[^"\n]+)" string="(?P<is_text>true|false)">'
            rf"(?P<value>.*?)</{tag}parameter>",
            re.DOTALL,
        ),
    )


FAMILIES: Mapping[str, CallFamily] = {
    family.name: family
    for family in (
        CallFamily("qwen_3", _HERMES_TAGS, _HERMES, "\n"),
        CallFamily("exaone", _HERMES_TAGS, _HERMES, "\n"),
        CallFamily("llama", ("<|python_tag|>",), JSONMarks(("<|python_tag|>", '{"name":')), "\n"),
        CallFamily("mistral", _MISTRAL_TAGS, _MISTRAL, "\n", trigger='[{"name": "', own_tags=_mistral_tags),
        CallFamily("mistral_v11", _MISTRAL_TAGS, _MISTRAL, own_tags=_mistral_v11_tags),
        CallFamily("qwen_3_coder", _HERMES_TAGS, _QWEN, "\n"),
        CallFamily("mimo", _HERMES_TAGS, _QWEN),
        CallFamily("glm_4_7", (*_HERMES_TAGS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"), _GLM, "\n"),
        CallFamily("minimax", _MINIMAX.around, _MINIMAX),
        CallFamily("deepseek_v3_2", ("｜DSML｜",), _dsml("function_calls")),
        CallFamily("deepseek_v4", ("｜DSML｜",), _dsml("tool_calls")),
        CallFamily("deepseek_v4_1", ("｜DSML｜",), _dsml("calls", " ")),
        CallFamily(
            "deepseek_v3_1",
            _DEEPSEEK_TAGS,
            CallMarks(
                ("<｜tool▁call▁begin｜>",),
                re.compile(r"<｜tool▁call▁begin｜>\s*(?P<name>[^<]+?)\s*<｜tool▁sep｜>\s*"),
                "<｜tool▁call▁end｜>",
                _DEEPSEEK_AROUND,
            ),
        ),
        CallFamily(
            "deepseek_r1",
            _DEEPSEEK_TAGS,
            CallMarks(
                ("<｜tool▁call▁begin｜>",),
                re.compile(
                    r"<｜tool▁call▁begin｜>\s*function<｜tool▁sep｜>(?P<name>[^\n]+)\n+```(?:json)?\s*(?=[\[{])"
                ),
                "<｜tool▁call▁end｜>",
                _DEEPSEEK_AROUND,
            ),
        ),
        CallFamily(
            "kimi",
            (
                "<|tool_calls_section_begin|>",
                "<|tool_calls_section_end|>",
                "<|tool_call_begin|>",
                "<|tool_call_argument_begin|>",
                "<|tool_call_end|>",
            ),
            CallMarks(
                ("<|tool_call_begin|>",),
                re.compile(
                    r"<\|tool_call_begin\|>\s*(?P<id>(?:functions\.)?(?P<name>[^<]+?)(?::\d+)?)\s*"
                    r"<\|tool_call_argument_begin\|>\s*"
                ),
                "<|tool_call_end|>",
                ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
            ),
        ),
        CallFamily("harmony", harmony.TAGS, None, end=harmony.CALL_END),
    )
}
