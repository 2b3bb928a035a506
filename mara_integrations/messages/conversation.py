"""The parts of a conversation: messages, tools and calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that an assistant made."""

    id: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)  # a dict can't be hashed


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(
        default_factory=lambda: {"type": "object", "properties": {}}, hash=False
    )  # a dict can't be hashed

    def as_dict(self) -> dict[str, Any]:
        """Return the tool in the form of OpenAI's API, which chat templates share."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks; `tool` is the result of a call.
        content: The text.
        tool_calls: Calls that an assistant made in this turn.
        tool_call_id: In a `tool` message, the id of the call that it answers.
        name: In a `tool` message, the name of the tool; found by `tool_call_id` if it is not given.
    """

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def as_dict(self, *, arguments_as_text: bool = False) -> dict[str, Any]:
        """Return the message in the form of OpenAI's API, which chat templates share.

        Args:
            arguments_as_text: Give the arguments of calls as JSON text, as some templates expect them.
        """
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            turn["tool_calls"] = [
                {
                    "type": "function",
                    "id": call.id,
                    "function": {
                        "name": call.name,
                        "arguments": json.dumps(call.arguments, ensure_ascii=False)
                        if arguments_as_text
                        else call.arguments,
                    },
                }
                for call in self.tool_calls
            ]
        if self.role == "tool":
            turn.update(tool_call_id=self.tool_call_id, name=self.name)
        return turn


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages together with the tools that may be called in them."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()

    def with_system(self, system_prompt: str | None) -> Conversation:
        """Return the conversation with a system message before it, unless it begins with one."""
        if not system_prompt or not self.messages or self.messages[0].role == "system":
            return self
        return Conversation((Message("system", system_prompt), *self.messages), self.tools)


# raw text (no chat template), a conversation, or token ids
Prompt: TypeAlias = str | Sequence[Message] | Sequence[int] | Conversation


def is_conversation(prompt: Any) -> bool:
    """Return whether a prompt is made of messages, and not of text or token ids."""
    if isinstance(prompt, Conversation):
        return True
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return False
    return len(prompt) > 0 and all(isinstance(item, Message) for item in prompt)
