"""LangChain's messages as ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from mara_integrations.errors import ConfigError
from mara_integrations.messages import Message, ToolCall


def as_conversation(messages: Sequence[BaseMessage]) -> list[Message]:
    """LangChain's messages as ours.

    Raises:
        ConfigError: If a message holds something else than text, or is of an unknown type.
    """
    return [_as_message(message) for message in messages]


def _as_message(message: BaseMessage) -> Message:
    text = _text(message.content)
    match message:
        case SystemMessage():
            return Message("system", text)
        case HumanMessage():
            return Message("user", text)
        case AIMessage():
            calls = (ToolCall(call["id"] or "", call["name"], call["args"]) for call in message.tool_calls)
            return Message("assistant", text, tool_calls=tuple(calls))
        case ToolMessage():
            return Message("tool", text, tool_call_id=message.tool_call_id, name=message.name)
        case FunctionMessage():
            return Message("tool", text, name=message.name)
        case ChatMessage(role="system" | "user" | "assistant" | "tool" as role):
            return Message(role, text)
    raise ConfigError(f"a message of type {message.type!r} has no place in a chat template", hint="give it a role")


# Parts of a message that are not for the model to read: calls are in `tool_calls`, thoughts are not shown again.
_UNREAD = ("tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call", "reasoning", "thinking")


def _text(content: str | list[str | dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    parts = []
    for block in content:
        if isinstance(block, str):
            parts.append(block)
        elif isinstance(block.get("text"), str):
            parts.append(block["text"])
        elif block.get("type") not in _UNREAD:
            raise ConfigError(f"content of type {block.get('type')!r} is not text", hint="the model reads text only")
    return "".join(parts)
