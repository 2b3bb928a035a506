"""Turns in the shape that a chat template takes: neighbours joined, tools and calls as text where it knows none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from mara_integrations.messages.conversation import Message, Tool, ToolCall

PLAIN_NAMES = {"user": "User", "assistant": "Assistant"}


def merged(messages: Iterable[Message]) -> list[Message]:
    """Join neighbours of one role; calls and results stay apart, each has its own place in a template."""
    turns: list[Message] = []
    for message in messages:
        last = turns[-1] if turns else None
        if last and last.role == message.role != "tool" and not last.tool_calls and not message.tool_calls:
            turns[-1] = replace(last, content=_joined(last.content, message.content))
        else:
            turns.append(message)
    return turns


def system_as_user(messages: Iterable[Message]) -> list[Message]:
    """Turn system messages into user turns, which `merged` joins with the turn that follows."""
    return [replace(message, role="user") if message.role == "system" else message for message in messages]


def calls_as_text(messages: Sequence[Message]) -> list[Message]:
    """Write calls and results between tags: the form that most open models have seen."""
    turns: list[Message] = []
    for message in messages:
        if message.role == "tool":
            result = json.dumps({"name": message.name, "content": message.content}, ensure_ascii=False)
            turns.append(Message("user", f"<tool_response>\n{result}\n</tool_response>"))
        elif message.tool_calls:
            calls = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
            lines = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls]
            turns.append(Message(message.role, _joined(message.content, *lines, by="\n")))
        else:
            turns.append(message)
    return turns


def tools_in_system(messages: Sequence[Message], tools: Sequence[Tool], example: str) -> list[Message]:
    """Describe the tools in the system message.

    Args:
        messages: The conversation.
        tools: What may be called; none change nothing.
        example: How a call is written.
    """
    turns = list(messages)
    if not tools:
        return turns
    schemas = "\n".join(json.dumps(tool.as_dict(), ensure_ascii=False) for tool in tools)
    text = f"You may call these functions:\n<tools>\n{schemas}\n</tools>\nTo call one, answer with\n{example}"
    has_system = turns[0].role == "system"
    turns[: int(has_system)] = [Message("system", _joined(turns[0].content, text) if has_system else text)]
    return turns


def with_tool_names(messages: Sequence[Message]) -> list[Message]:
    """Name the tool of each result after the call it answers: frameworks send the id alone, templates ask the name."""
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    return [
        replace(message, name=names.get(message.tool_call_id or ""))
        if message.role == "tool" and message.name is None
        else message
        for message in messages
    ]


def with_kimi_ids(messages: Sequence[Message]) -> list[Message]:
    """Give calls the ids that Kimi models write and read, as `functions.add:0`, counted over the conversation."""
    turns: list[Message] = []
    known: dict[str, str] = {}
    count = 0
    for message in messages:
        calls: list[ToolCall] = []
        for call in message.tool_calls:
            is_kimis = re.fullmatch(rf"functions\.{re.escape(call.name)}:\d+", call.id)
            known[call.id] = call.id if is_kimis else f"functions.{call.name}:{count}"
            calls.append(replace(call, id=known[call.id]))
            count += 1
        answered = known.get(message.tool_call_id or "", message.tool_call_id)
        turns.append(replace(message, tool_calls=tuple(calls), tool_call_id=answered))
    return turns


def as_plain_text(messages: Sequence[Message]) -> str:
    """Write turns for a model without a template.

    No space follows the last colon: it would split the first word of the reply.
    """
    turns = [
        f"{PLAIN_NAMES[message.role]}: {message.content}" if message.role in PLAIN_NAMES else f"{message.content}\n"
        for message in messages
    ]
    return "\n".join([*turns, f"{PLAIN_NAMES['assistant']}:"])


def _joined(*parts: str, by: str = "\n\n") -> str:
    return by.join(part for part in parts if part)
