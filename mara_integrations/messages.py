"""Messages and tools, and the one place that turns a prompt into token ids.

It knows chat templates and special tokens; it knows no model, no framework, and imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import index
from typing import Any, Literal, TypeAlias

from mara_integrations.errors import ConfigError, ContextLengthError, ModelError

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that an assistant made."""

    id: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)  # a dict can't be hashed


@dataclass(frozen=True, slots=True)
class Tool:
    """A function a model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(
        default_factory=lambda: {"type": "object", "properties": {}}, hash=False
    )  # a dict can't be hashed


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks; `tool` is the result of a call.
        content: The text.
        tool_calls: Calls an assistant made in this turn.
        tool_call_id: Of a `tool` message: the call it answers.
        name: Of a `tool` message: the tool; found by `tool_call_id` when it is not given.
    """

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As chat templates and OpenAI's API have it."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            turn["tool_calls"] = [
                {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
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
        """The same with a system message before it, where it brings none."""
        if not system_prompt or not self.messages or self.messages[0].role == "system":
            return self
        return Conversation((Message("system", system_prompt), *self.messages), self.tools)


# raw text (no chat template), a conversation, or token ids
Prompt: TypeAlias = str | Sequence[Message] | Sequence[int] | Conversation

_PLAIN_NAMES = {"user": "User", "assistant": "Assistant"}


class PromptEncoder:
    """Renders conversations with a tokenizer's chat template and turns every kind of prompt into token ids.

    Args:
        tokenizer: A tokenizer of transformers.
        name: The model, for error messages.
        vocab_size: Rows of the model's embedding; token ids past it are refused. None: the tokenizer's own size.
        max_tokens: Tokens of the context window. A text too long for it by its characters alone is refused before it is
            tokenised, which would take seconds a megabyte. None: no bound.
        template_kwargs: Further variables of the template, as `{"enable_thinking": False}`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        name: str = "model",
        vocab_size: int | None = None,
        max_tokens: int | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self.vocab_size = vocab_size
        self.max_tokens = max_tokens
        self.template_kwargs = dict(template_kwargs or {})

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer brings a chat template; without one, turns are written as `User:` and `Assistant:`."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def default_stop(self) -> tuple[str, ...]:
        """Strings that end a turn where no special token does: those of the plain form, else none."""
        return () if self.has_template else tuple(f"\n{name}:" for name in _PLAIN_NAMES.values())

    def stop_for(self, prompt: Prompt) -> tuple[str, ...]:
        """`default_stop` for a conversation; nothing for raw text and token ids, whose form is the caller's own."""
        return self.default_stop if _is_conversation(prompt) else ()

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = (), **template_kwargs: Any) -> str:
        """The text the model is given, up to where the assistant's turn begins.

        Neighbours of one role become one turn. A system message becomes part of the next user turn where the template
        refuses or drops it; tools, calls and results become text where the template has no place for them.

        Raises:
            ConfigError: If there are no messages.
            ModelError: If the template fails on every form of the conversation; names the model and the cause.
        """
        if not messages:
            raise ConfigError("the conversation has no messages", hint="give at least one user message")
        messages = _with_tool_names(messages)
        if not self.has_template:
            return _plain(_merged(_tools_as_text(messages, tools)))
        flat = _tools_as_text(messages, tools)
        forms: list[tuple[Sequence[Message], Sequence[Tool]]] = [(messages, tools), (flat, ())]
        if not self._knows_tools(tools) and flat != list(messages):
            del forms[0]  # such a template would drop the tools without a word
        first_error: Exception | None = None
        for turns, known_tools in forms:
            for form in (_merged(turns), _merged(_system_as_user(turns))):
                try:
                    text = self._apply(form, known_tools, template_kwargs)
                except Exception as error:  # a template is a program of the model's author and may raise anything
                    first_error = first_error or error
                else:
                    if all(m.content.strip() in text for m in form if m.role == "system"):
                        return text
        cause = str(first_error or "it drops the system message").strip().split("\n")[0]
        raise ModelError(
            f"the chat template of {self.name!r} fails on roles {[m.role for m in messages]}: {cause}",
            hint="alternate user and assistant messages, or set the tokenizer's chat_template",
        ) from first_error

    def encode(self, prompt: Prompt, tools: Sequence[Tool] = (), **template_kwargs: Any) -> list[int]:
        """Token ids of a prompt.

        Raw text gets the special tokens the tokenizer puts before a text, but no second BOS and no EOS at its end. A
        rendered conversation gets none: its template wrote them.

        Raises:
            ConfigError: If the conversation is empty, the prompt is of another type, or an id is not in the vocabulary.
            ContextLengthError: If the text has more characters than `max_tokens` of the longest tokens.
            ModelError: If the chat template fails.
        """
        if isinstance(prompt, str):
            return self._encode_text(prompt)
        if isinstance(prompt, Conversation):
            tools = (*prompt.tools, *tools)
            prompt = prompt.messages
        if _is_conversation(prompt):
            text = self.render(prompt, tools, **template_kwargs)  # type: ignore[arg-type]  # messages, checked above
            return self._ids(text, special=False) if self.has_template else self._encode_text(text)
        try:
            token_ids = [index(token_id) for token_id in prompt]  # type: ignore[arg-type]  # index() refuses the rest
        except TypeError:
            raise ConfigError(
                f"a prompt can't be {_shown(prompt)}", hint="give a string, a list of Message, or a list of token ids"
            ) from None
        size = self.vocab_size if self.vocab_size is not None else len(self.tokenizer)
        for token_id in token_ids:
            if not 0 <= token_id < size:
                raise ConfigError(f"token id {token_id} is not in the vocabulary of {self.name!r} (0 to {size - 1})")
        if not token_ids:
            raise ConfigError("the prompt is empty", hint="give it at least one message or token id")
        return token_ids

    def _apply(self, messages: Sequence[Message], tools: Sequence[Tool], template_kwargs: dict[str, Any]) -> str:
        text = self.tokenizer.apply_chat_template(
            [message.as_dict() for message in messages],
            tools=[_tool_schema(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=True,
            **{**self.template_kwargs, **template_kwargs},
        )
        assert isinstance(text, str)
        return text

    def _knows_tools(self, tools: Sequence[Tool]) -> bool:
        """Whether the template itself mentions what it is given: a `tools` variable, or tool turns at all."""
        template = self.tokenizer.get_chat_template(None, tools=[_tool_schema(tool) for tool in tools] or None)
        return re.search(r"\btools\b" if tools else "tool", template) is not None

    def _encode_text(self, text: str) -> list[int]:
        bos = getattr(self.tokenizer, "bos_token", None)
        if bos and text.startswith(bos):
            return self._ids(text, special=False)
        token_ids = self._ids(text, special=True)
        if self._ends_every_text and not text.endswith(self.tokenizer.eos_token):
            token_ids.pop()  # a prompt goes on
        return token_ids

    @cached_property
    def _ends_every_text(self) -> bool:
        """Whether the tokenizer puts an EOS behind every text."""
        eos = getattr(self.tokenizer, "eos_token_id", None)
        with_special, plain = self._ids("a", special=True), self._ids("a", special=False)
        return len(with_special) > len(plain) and with_special[-1] == eos and plain[-1:] != [eos]

    @cached_property
    def _longest_token(self) -> int:
        """Characters of the longest token; in a byte-level vocabulary its bytes, which are no fewer."""
        return max(map(len, self.tokenizer.get_vocab()))

    def _ids(self, text: str, *, special: bool) -> list[int]:
        if self.max_tokens is not None and len(text) > self.max_tokens * self._longest_token:
            raise ContextLengthError(
                f"the prompt has {len(text)} characters; this model's maximum context length is {self.max_tokens} "
                f"tokens of at most {self._longest_token} characters",
                hint="shorten the prompt",
            )
        # not encode(): tokenizers differ in what it returns for long texts; verbose would warn of the maximal length
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _is_conversation(prompt: Any) -> bool:
    if isinstance(prompt, Conversation):
        return True
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return False
    return len(prompt) > 0 and all(isinstance(item, Message) for item in prompt)


def _merged(messages: Iterable[Message]) -> list[Message]:
    """Neighbours of one role as one turn; calls and results stay apart, each has its own place in a template."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        if last and last.role == message.role != "tool" and not last.tool_calls and not message.tool_calls:
            merged[-1] = replace(last, content=_joined(last.content, message.content))
        else:
            merged.append(message)
    return merged


def _system_as_user(messages: Iterable[Message]) -> list[Message]:
    """System messages as user turns, which `_merged` joins with the turn that follows."""
    return [replace(message, role="user") if message.role == "system" else message for message in messages]


def _tools_as_text(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Tools in the system message, calls and results between tags: the form most open models have seen."""
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
    if tools:
        schemas = "\n".join(json.dumps(_tool_schema(tool), ensure_ascii=False) for tool in tools)
        text = (
            f"You may call these functions:\n<tools>\n{schemas}\n</tools>\nTo call one, answer with\n"
            '<tool_call>\n{"name": <function name>, "arguments": <object of arguments>}\n</tool_call>'
        )
        has_system = turns[0].role == "system"
        turns[: int(has_system)] = [Message("system", _joined(turns[0].content, text) if has_system else text)]
    return turns


def _with_tool_names(messages: Sequence[Message]) -> list[Message]:
    """Name the tool of each result after the call it answers: frameworks send the id alone, templates ask the name."""
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    return [
        replace(message, name=names.get(message.tool_call_id or ""))
        if message.role == "tool" and message.name is None
        else message
        for message in messages
    ]


def _plain(messages: Sequence[Message]) -> str:
    """The form for models without a template. No space after the last colon: it would split the reply's first word."""
    turns = [
        f"{_PLAIN_NAMES[message.role]}: {message.content}" if message.role in _PLAIN_NAMES else f"{message.content}\n"
        for message in messages
    ]
    return "\n".join([*turns, f"{_PLAIN_NAMES['assistant']}:"])


def _tool_schema(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _joined(*parts: str, by: str = "\n\n") -> str:
    return by.join(part for part in parts if part)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
