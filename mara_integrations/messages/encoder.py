"""Turn a conversation into token ids with the model's chat template and tokenizer, and make up for what they lack."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from operator import index
from typing import Any

from mara_integrations.errors import ConfigError, ContextLengthError, ModelError
from mara_integrations.messages.control_tokens import ControlTokens
from mara_integrations.messages.conversation import Conversation, Message, Prompt, Tool, is_conversation
from mara_integrations.messages.families import GENERIC, example_of, family_of, has_own_calls, takes_tools
from mara_integrations.messages.turns import (
    PLAIN_NAMES,
    as_plain_text,
    calls_as_text,
    merged,
    system_as_user,
    tools_in_system,
    with_kimi_ids,
    with_tool_names,
)

_log = logging.getLogger(__name__)


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
        self._has_warned = False

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer brings a chat template; without one, turns are written as `User:` and `Assistant:`."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def default_stop(self) -> tuple[str, ...]:
        """Strings that end a turn where no special token does: those of the plain form, else none."""
        return () if self.has_template else tuple(f"\n{name}:" for name in PLAIN_NAMES.values())

    def stop_for(self, prompt: Prompt) -> tuple[str, ...]:
        """Return `default_stop` for a conversation; nothing for raw text and token ids, whose form is the caller's."""
        return self.default_stop if is_conversation(prompt) else ()

    @property
    def family(self) -> str:
        """The form of tool calls under xgrammar's names; the generic form if the template writes no calls."""
        return self._family or GENERIC

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = (), **template_kwargs: Any) -> str:
        """Return the text that the model is given, up to where the assistant's turn begins.

        Neighbours of one role become one turn. A system message becomes part of the next user turn where the template
        refuses or drops it; tools, calls and results become text where the template has no place for them.

        Raises:
            ConfigError: If there are no messages.
            ModelError: If the template fails on every form of the conversation; names the model and the cause.
        """
        if not messages:
            raise ConfigError("the conversation has no messages", hint="give at least one user message")
        if tools:
            self._warn_of_tools()
        messages = with_tool_names(messages)
        if self._family == "kimi":
            messages = with_kimi_ids(messages)
        if not self.has_template:
            return as_plain_text(merged(tools_in_system(calls_as_text(messages), tools, self._example)))
        first_error: Exception | None = None
        for turns, known_tools in self._forms(messages, tools):
            has_calls = any(message.tool_calls for message in turns)
            for form in (merged(turns), merged(system_as_user(turns))):
                for as_text in (False, True) if has_calls else (False,):
                    try:
                        text = self._apply(form, known_tools, template_kwargs, arguments_as_text=as_text)
                    except Exception as error:  # a template is a program of the model's author and may raise anything
                        first_error = first_error or error
                        continue
                    has_system = all(m.content.strip() in text for m in form if m.role == "system")
                    if has_system and (as_text or not _shows_python(text, form)):
                        return text
        cause = str(first_error or "it drops the system message").strip().split("\n")[0]
        raise ModelError(
            f"the chat template of {self.name!r} fails on roles {[m.role for m in messages]}: {cause}",
            hint="alternate user and assistant messages, or set the tokenizer's chat_template",
        ) from first_error

    def encode(self, prompt: Prompt, tools: Sequence[Tool] = (), **template_kwargs: Any) -> list[int]:
        """Return the token ids of a prompt.

        Raw text gets the special tokens the tokenizer puts before a text, but no second BOS and no EOS at its end. A
        rendered conversation gets none: its template wrote them. Control tokens that the contents of a conversation
        spell out, as `<|im_start|>` in a document, are text; in raw text they are control tokens.

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
        if is_conversation(prompt):
            return self._encode_conversation(prompt, tools, template_kwargs)  # type: ignore[arg-type]  # messages
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

    def _encode_conversation(
        self, messages: Sequence[Message], tools: Sequence[Tool], template_kwargs: dict[str, Any]
    ) -> list[int]:
        if not self._control_tokens.occur_in(messages, tools):
            text = self.render(messages, tools, **template_kwargs)
            return self._ids(text, special=False) if self.has_template else self._encode_text(text)
        turns, known, guard = self._control_tokens.guarded(messages, tools)
        text = self.render(turns, known, **template_kwargs)
        self._check_length(guard.restore(text))
        before = [] if self.has_template else self._encode_text("")
        return before + self._control_tokens.encode(text, guard)

    def _forms(self, messages: list[Message], tools: Sequence[Tool]) -> list[tuple[Sequence[Message], Sequence[Tool]]]:
        """Return the conversation and the tools as a template may take them, the best first."""
        flat = tools_in_system(calls_as_text(messages), tools, self._example)
        template = self._template(tools)
        if takes_tools(template) if tools else "tool" in template:
            return [(messages, tools), (flat, ())]
        if has_own_calls(self._family):
            return [(tools_in_system(messages, tools, self._example), ()), (flat, ())]
        return [(flat, ())]  # such a template would drop the tools without a word

    def _apply(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        template_kwargs: dict[str, Any],
        *,
        arguments_as_text: bool,
    ) -> str:
        text = self.tokenizer.apply_chat_template(
            [message.as_dict(arguments_as_text=arguments_as_text) for message in messages],
            tools=[tool.as_dict() for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=True,
            **{**self.template_kwargs, **template_kwargs},
        )
        assert isinstance(text, str)
        return text

    def _template(self, tools: Sequence[Tool]) -> str:
        """Return the chat template; some tokenizers have one of their own for conversations with tools."""
        template: str = self.tokenizer.get_chat_template(None, tools=[tool.as_dict() for tool in tools] or None)
        return template

    @cached_property
    def _family(self) -> str | None:
        if not self.has_template:
            return None
        added = [token.content for token in getattr(self.tokenizer, "added_tokens_decoder", {}).values()]
        return family_of(self._template((Tool("any"),)), added)

    @cached_property
    def _example(self) -> str:
        return example_of(self._family)

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        return ControlTokens(self.tokenizer, self._template(()) if self.has_template else "")

    def _warn_of_tools(self) -> None:
        """Warn once that the template of this model takes no tools, or writes calls in an unknown form."""
        if self._has_warned:
            return
        self._has_warned = True
        if not self.has_template or not takes_tools(self._template((Tool("any"),))):
            _log.warning(
                "the chat template of %s has no place for tools: they are described in the system message", self.name
            )
        elif self._family is None:
            _log.warning(
                "the chat template of %s writes tool calls in a form that is not known here: calls are asked for and "
                'read as <tool_call>{"name": ..., "arguments": {...}}</tool_call>',
                self.name,
            )

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
        """Characters of the longest token; in a byte-level vocabulary its bytes, which are at least as many."""
        return max(map(len, self.tokenizer.get_vocab()))

    def _ids(self, text: str, *, special: bool) -> list[int]:
        self._check_length(text)
        # not encode(): tokenizers differ in what it returns for long texts; verbose would warn of the maximal length
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _check_length(self, text: str) -> None:
        if self.max_tokens is not None and len(text) > self.max_tokens * self._longest_token:
            raise ContextLengthError(
                f"the prompt has {len(text)} characters; this model's maximum context length is {self.max_tokens} "
                f"tokens of at most {self._longest_token} characters",
                hint="shorten the prompt",
            )


def _shows_python(text: str, messages: Sequence[Message]) -> bool:
    """Return whether a template wrote arguments as Python does, because it takes them as text."""
    calls = [call for message in messages for call in message.tool_calls if call.arguments]
    return any(repr(call.arguments) in text and json.dumps(call.arguments) not in text for call in calls)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
