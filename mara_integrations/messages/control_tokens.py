"""Text of messages stays text: control tokens that it spells, as `<|im_start|>`, are tokenised letter by letter.

A chat template writes control tokens and contents into one text, in which a tokenizer can't tell them apart. So the
control tokens of contents are replaced by placeholders before the template is rendered, those of the template by names
that nobody can guess, and then the contents are put back.
"""

from __future__ import annotations

import json
import re
import secrets
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

from mara_integrations.messages.conversation import Message, Tool

# An assistant's own thoughts, which chat templates look for.
_THOUGHT_TAGS = ("<think>", "</think>")
_UNLIKELY = -1e6  # log-probability of a control token's text as a piece of a Unigram model
_Value = TypeVar("_Value")


class ControlTokens:
    """The control tokens of one tokenizer, and contents in which they are text.

    Control tokens are those that the tokenizer calls special, and the added ones that the chat template mentions. Other
    added tokens, as white space or HTML, are parts of ordinary text.

    Args:
        tokenizer: A tokenizer of transformers.
        template: The chat template.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        texts = {token.content for token in added.values() if token.special or _is_written(token.content, template)}
        self._texts = sorted((text for text in texts if text.strip()), key=len, reverse=True)
        self._ids = {token.content: token_id for token_id, token in added.items()}
        self._pattern = re.compile("|".join(map(re.escape, self._texts)) or r"(?!)", re.IGNORECASE)
        self._nonce = secrets.token_hex(8)

    def occur_in(self, messages: Sequence[Message], tools: Sequence[Tool]) -> bool:
        """Return whether a message or a tool holds the text of a control token, in any case or form of letters."""
        return any(
            self._pattern.search(text) or self._pattern.search(unicodedata.normalize("NFKC", text))
            for text in _texts_of(messages, tools)
        )

    def guarded(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[list[Message], list[Tool], Guard]:
        """Return messages and tools with placeholders for control tokens, and the guard that restores the texts."""
        guard = Guard(self._pattern, self._nonce)
        turns = [
            replace(
                message,
                content=guard.hide(message.content, spared=_THOUGHT_TAGS if message.role == "assistant" else ()),
                tool_calls=tuple(replace(call, arguments=guard.hide(call.arguments)) for call in message.tool_calls),
            )
            for message in messages
        ]
        known = [
            replace(tool, description=guard.hide(tool.description), parameters=guard.hide(tool.parameters))
            for tool in tools
        ]
        return turns, known, guard

    def encode(self, rendered: str, guard: Guard) -> list[int]:
        """Return token ids of a text with placeholders: control tokens outside of them, letters in them."""
        if self._twin is None:
            return self._encode_in_pieces(rendered, guard)
        named = self._exactly.sub(lambda match: self._name(match[0]), rendered)
        token_ids = self._twin.encode(guard.restore(named), add_special_tokens=False).ids
        return [self._twin_ids.get(token_id, token_id) for token_id in token_ids]

    @cached_property
    def _exactly(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._texts)) or r"(?!)")

    def _name(self, text: str) -> str:
        return f"<{self._nonce}:{self._texts.index(text)}>"

    @cached_property
    def _twin(self) -> Any:
        """The tokenizer with its control tokens under other names; None for one that is written in Python."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        from tokenizers import Tokenizer

        state = json.loads(backend.to_str())
        state.update(truncation=None, padding=None)
        for token in state["added_tokens"]:
            if token["content"] in self._texts:
                token["content"] = self._name(token["content"])
        if state["model"]["type"] == "Unigram":  # which takes any text that is in its vocabulary
            for piece in state["model"]["vocab"]:
                piece[1] = _UNLIKELY if piece[0] in self._texts else piece[1]
        return Tokenizer.from_str(json.dumps(state))

    @cached_property
    def _twin_ids(self) -> dict[int, int]:
        """Token ids of the tokenizer by those of the twin, where they differ."""
        ids = {text: self._name(text) if text in self._texts else text for text in self._ids}
        return {self._twin.token_to_id(name): self._ids[text] for text, name in ids.items()}

    def _encode_in_pieces(self, rendered: str, guard: Guard) -> list[int]:
        token_ids: list[int] = []
        for piece in re.split(f"({self._exactly.pattern})", rendered):
            is_control = piece in self._ids and piece in self._texts
            text = guard.restore(piece)
            ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=not is_control, verbose=False)
            token_ids += ids["input_ids"]
        return token_ids


class Guard:
    """Placeholders for pieces of text, and the pieces.

    Args:
        pattern: Matches the pieces to hide.
        nonce: Letters that no text holds.
    """

    def __init__(self, pattern: re.Pattern[str], nonce: str) -> None:
        self._pattern, self._nonce = pattern, nonce
        self._hidden: list[str] = []

    def hide(self, value: _Value, spared: tuple[str, ...] = ()) -> _Value:
        """Return a value of JSON with placeholders in its texts."""
        if isinstance(value, str):
            return self._pattern.sub(lambda match: self._hide(match[0], spared), value)  # type: ignore[return-value]
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(each) for key, each in value.items()}  # type: ignore[return-value]
        if isinstance(value, list | tuple):
            return type(value)(self.hide(each) for each in value)
        return value

    def restore(self, text: str) -> str:
        """Return a text with the hidden pieces in their places."""
        return re.sub(f"{self._nonce}x(\\d+)x", lambda match: self._hidden[int(match[1])], text)

    def _hide(self, text: str, spared: tuple[str, ...]) -> str:
        if text in spared:
            return text
        self._hidden.append(text)
        return f"{self._nonce}x{len(self._hidden) - 1}x"


def _is_written(token: str, template: str) -> bool:
    """Return whether a template mentions a token, or the tag that it closes."""
    return token in template or token.replace("</", "<") in template


def _texts_of(messages: Sequence[Message], tools: Sequence[Tool]) -> Iterable[str]:
    values: list[Any] = [[message.content, [call.arguments for call in message.tool_calls]] for message in messages]
    values += [[tool.description, tool.parameters] for tool in tools]
    while values:
        value = values.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            values += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            values += value
