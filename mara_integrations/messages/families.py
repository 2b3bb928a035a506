"""Recognise the family of models of a chat template by the marks with which it writes tool calls."""

from __future__ import annotations

import re
from collections.abc import Collection

# Those of xgrammar go by its names. The first whose marks are all there is the one.
_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>", "<|message|>")),
    ("kimi", ("<|tool_calls_section_begin|>",)),
    ("deepseek_r1", ("<｜tool▁calls▁begin｜>", "```json")),
    ("deepseek_v3_1", ("<｜tool▁calls▁begin｜>",)),
    ("deepseek_v3_2", ("｜DSML｜", "function_calls>")),
    ("deepseek_v4_1", ("｜DSML｜", " calls>")),
    ("deepseek_v4", ("｜DSML｜", "tool_calls>")),
    ("minimax", ("<minimax:tool_call>",)),
    ("glm_4_7", ("<arg_key>", "<tool_call>")),
    ("mimo", ("<tool_call><function=",)),
    ("qwen_3_coder", ("<tool_call>", "<function=")),
    ("exaone", ("<tool_call>", "[|assistant|]")),
    ("mistral_v11", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("llama", ('"parameters": ', "ipython")),
    ("qwen_3", ("<tool_call>",)),
)
# Of MiniMax M3, which writes nested markup inside a <tool_call>: its calls are not those of another family.
_OF_UNKNOWN_FAMILIES = ("]<]minimax[>[",)
# The form that most open models have seen; for templates without tools, and for those of an unknown form.
GENERIC = "qwen_3"
_GENERIC_EXAMPLE = '<tool_call>\n{"name": <function name>, "arguments": <object of arguments>}\n</tool_call>'
# Families whose templates write calls, but leave it to the user to describe the tools and the form of a call.
_EXAMPLES = {
    "deepseek_r1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜><function name>\n"
    "```json\n<object of arguments>\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v3_1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜><function name><｜tool▁sep｜>"
    "<object of arguments><｜tool▁call▁end｜><｜tool▁calls▁end｜>",
}


def family_of(template: str | None, vocabulary: Collection[str] = ()) -> str | None:
    """Return the family of models that a chat template was written for; None for one that is not known.

    Args:
        template: The chat template.
        vocabulary: Added tokens of the tokenizer. They decide where a template takes tools and writes no calls.
    """
    if not template or any(mark in template for mark in _OF_UNKNOWN_FAMILIES):
        return None
    by_template = _by_marks(template)
    if takes_tools(template):
        return by_template or _by_marks("\n".join(vocabulary))
    return by_template if by_template in _EXAMPLES or by_template == "harmony" else None


def takes_tools(template: str) -> bool:
    """Return whether a chat template mentions a `tools` variable."""
    return re.search(r"\btools\b", template) is not None


def example_of(family: str | None) -> str:
    """Return how a call is written, for templates that don't say it."""
    return _EXAMPLES.get(family or GENERIC, _GENERIC_EXAMPLE)


def has_own_calls(family: str | None) -> bool:
    """Return whether templates of the family write calls and results, though they take no tools."""
    return family in _EXAMPLES


def _by_marks(text: str) -> str | None:
    return next((name for name, marks in _MARKS if all(mark in text for mark in marks)), None)
