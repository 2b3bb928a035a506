"""From token ids to text as it grows: whole characters only, stop strings held back and cut off."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # what a tokenizer decodes an incomplete UTF-8 sequence to


class TextStream:
    """The text of one reply.

    Args:
        tokenizer: Anything with transformers' `decode`.
        stop: Strings that end the reply; text that may be the beginning of one is held back until it is clear.
        shown: Special tokens that are part of the text, as the marks of tool calls; all others are left out.

    Attributes:
        shown: As given.
        text: The text that is certain.
        stopped: Whether a stop string has ended the reply.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), shown: Collection[str] = ()) -> None:
        self.shown = tuple(shown)
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        added = getattr(tokenizer, "added_tokens_decoder", {}) if shown else {}
        special = {token_id: token.content for token_id, token in added.items() if token.special}
        hidden = {token_id for token_id, text in special.items() if text not in shown}
        self._hidden = hidden if len(hidden) < len(special) else None  # None: all of them, as the tokenizer does itself
        self._token_ids: list[int] = []
        self._prefix = self._read = 0  # tokens before _read are in the text; decoding starts at _prefix for context
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Read one more token; return the text that is now certain, which may be empty."""
        self._token_ids.append(token_id)
        known, now = self._decode(self._prefix, self._read), self._decode(self._prefix, None)
        if len(now) <= len(known) or now.endswith(_UNFINISHED):
            return ""
        self._prefix, self._read = self._read, len(self._token_ids)
        return self._release(now[len(known) :], final=False)

    def finish(self) -> str:
        """Return what was held back: no token follows, so it is text after all."""
        if self.stopped:
            return ""
        known, now = self._decode(self._prefix, self._read), self._decode(self._prefix, None)
        self._prefix = self._read = len(self._token_ids)
        return self._release(now[len(known) :], final=True)

    def _decode(self, start: int, end: int | None) -> str:
        token_ids = self._token_ids[start:end]
        if self._hidden is not None:
            token_ids = [token_id for token_id in token_ids if token_id not in self._hidden]
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=self._hidden is None, clean_up_tokenization_spaces=False
        )
        return text

    def _release(self, new: str, *, final: bool) -> str:
        text = self._held + new
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            text, self._held, self.stopped = text[: min(found)], "", True
        else:
            keep = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
