"""Convert LlamaIndex' messages to ours, and count tokens for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import llama_index.core
from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.utils import set_global_tokenizer
from pydantic_core import from_json

from mara_integrations.errors import ConfigError
from mara_integrations.messages import Message, Role, ToolCall

_log = logging.getLogger(__name__)


class TokenCount:
    """A model's tokenizer as LlamaIndex counts with it: from text to token ids, without special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def count_with(tokenizer: Any) -> None:
    """Make this the tokenizer of LlamaIndex, unless the user has chosen one; None is a server's, out of reach.

    LlamaIndex counts with one tokenizer a process, and asks for it right after an LLM's metadata. So whoever reads the
    metadata gets the count of that model, also where several are used. Its default, GPT-3.5's, would let prompts grow
    longer than the context window of a small model.
    """
    if tokenizer is None:
        return
    current = llama_index.core.global_tokenizer
    is_default = isinstance(current, partial) and current.keywords == {"allowed_special": "all"}  # `get_tokenizer` sets
    if isinstance(current, TokenCount):
        is_default = current.tokenizer is not tokenizer  # another model's
    if current is None or is_default:
        _log.info("LlamaIndex counts tokens by this model's tokenizer now; Settings.tokenizer = ... chooses another")
        set_global_tokenizer(TokenCount(tokenizer))


def as_conversation(messages: Sequence[ChatMessage]) -> list[Message]:
    """Convert LlamaIndex' messages to ours.

    Raises:
        ConfigError: If a message holds something else than text and calls.
    """
    return [_as_message(message) for message in messages]


_ROLES: dict[MessageRole, Role] = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}


def _as_message(message: ChatMessage) -> Message:
    for block in message.blocks:
        if not isinstance(block, TextBlock | ToolCallBlock | ThinkingBlock | CachePoint):
            raise ConfigError(f"a {type(block).__name__} is not text", hint="the model reads text only")
    calls = [
        ToolCall(block.tool_call_id or "", block.tool_name, read_arguments(block.tool_kwargs))
        for block in message.blocks
        if isinstance(block, ToolCallBlock)
    ]
    return Message(
        _ROLES[message.role],
        message.content or "",
        tool_calls=tuple(calls),
        tool_call_id=message.additional_kwargs.get("tool_call_id"),
        name=message.additional_kwargs.get("name"),
    )


def read_arguments(arguments: dict[str, Any] | str) -> dict[str, Any]:
    """Return the arguments of a call. They may be half-written, or text of another model that is not JSON."""
    if isinstance(arguments, dict):
        return arguments
    try:
        parsed = from_json(arguments, allow_partial="trailing-strings")
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}
