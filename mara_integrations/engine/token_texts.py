"""The text that each token of a vocabulary adds to a reply, in bytes: a character may spread over several tokens."""

from __future__ import annotations

import codecs
import json
import sys
import threading
import weakref
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from re import Pattern
from typing import Any

from cachetools import LRUCache
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mara_integrations.errors import ConfigError
from mara_integrations.rewards.words import folded_character, is_in_word

_NUM_CHECKED, _CHECKED_TOGETHER = 256, 4
_MAX_KEPT = 64
_known: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], TokenTexts]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class TokenTexts:
    """The tokens of one vocabulary as text.

    Args:
        tokenizer: The model's tokenizer.
        vocab_size: Width of the logits, V.
        hidden: Ids of the tokens that add no text.

    Attributes:
        data: The bytes of each token, V of them.
        texts: The whole characters of each token; bytes that are not UTF-8 are U+FFFD.
        unfinished: The bytes behind, which begin another character.
        within: Ids of the tokens whose first byte goes on with a character.
        open: Ids of the tokens that end inside a character, or add no text.
        kept: What is made of them, for whoever holds `lock`.
        characters: The characters of all texts.

    Raises:
        ConfigError: If the tokenizer writes its tokens in an unknown way.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, hidden: Collection[int]) -> None:
        self.data = _token_bytes(tokenizer, vocab_size, frozenset(hidden))
        read = [read_bytes(data) for data in self.data]
        self.texts = [text for text, _ in read]
        self.unfinished = [rest for _, rest in read]
        self.within = [i for i, data in enumerate(self.data) if data and 0x80 <= data[0] <= 0xBF]
        self.open = [i for i, text in enumerate(self.texts) if self.unfinished[i] or not text]
        self.kept: LRUCache[Any, Any] = LRUCache(_MAX_KEPT)
        self.lock = threading.Lock()
        self.characters = frozenset().union(*self.texts)
        self._plain = _Joined(self.texts)
        self._folded = _Joined(["".join(map(folded_character, text)) for text in self.texts])

    @classmethod
    def of(cls, tokenizer: Any, vocab_size: int, shown: Collection[str], eos_token_ids: Collection[int]) -> TokenTexts:
        """Return the one object of a tokenizer.

        Args:
            tokenizer: The model's tokenizer.
            vocab_size: Width of the logits.
            shown: Special tokens that are part of the text.
            eos_token_ids: Tokens that end a reply, and add no text.
        """
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {token_id for token_id, token in added.items() if token.special}
        special |= {*getattr(tokenizer, "all_special_ids", ())}
        hidden = {i for i in special if i not in added or str(added[i].content) not in shown} | {*eos_token_ids}
        key = (vocab_size, frozenset(hidden))
        with _lock:
            known = _known.setdefault(tokenizer, {})
            if key not in known:
                known[key] = cls(tokenizer, vocab_size, hidden)
            return known[key]

    def first_folded(self) -> Iterator[tuple[int, str]]:
        """Yield the tokens with a whole character, and the first one as it is compared."""
        for token_id, text in enumerate(self.texts):
            if text:
                yield token_id, folded_character(text[0])[0]

    def matching(self, folded: Pattern[str] | None, plain: Pattern[str] | None) -> set[int]:
        """Return ids of the tokens whose folded or plain text has a match; NUL is before and after each text."""
        found = self._folded.matching(folded) if folded is not None else set()
        return found | self._plain.matching(plain) if plain is not None else found


class _Joined:
    """Texts as one string, which a regular expression searches at once."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._text = "\0".join(["", *texts, ""])
        self._begins = [0, *accumulate(len(text) + 1 for text in texts)]

    def matching(self, pattern: Pattern[str]) -> set[int]:
        return {bisect_right(self._begins, match.start()) - 1 for match in pattern.finditer(self._text)}


def read_bytes(data: bytes) -> tuple[str, bytes]:
    """Return the whole characters of some bytes, and the bytes of one that is unfinished."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data)
    return text, decoder.getstate()[0]


def possible_codes(unfinished: bytes) -> range:
    """Return the codes of the characters that begin with these bytes of an unfinished one."""
    lead, num_known = unfinished[0], len(unfinished)
    size = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    value = lead & (0xFF >> (size + 1))
    for byte in unfinished[1:]:
        value = value << 6 | byte & 0x3F
    shift = 6 * (size - num_known)
    first = {2: 0x80, 3: 0x800, 4: 0x10000}[size]
    return range(max(value << shift, first), min((value + 1) << shift, sys.maxunicode + 1))


@lru_cache(maxsize=4096)
def may_become_letter(unfinished: bytes) -> bool:
    """Return whether a letter, digit or accent begins with these bytes of an unfinished character."""
    if unfinished[0] > 0xF0:  # Unicode has no letters from U+40000 on
        return False
    return any(is_in_word(folded_character(chr(code))[0]) for code in possible_codes(unfinished))


def _token_bytes(tokenizer: Any, vocab_size: int, hidden: frozenset[int]) -> list[bytes]:
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))
    as_bytes = _byte_level if _is_byte_level(tokenizer) else _sentence_piece
    data = [b"" if piece is None or i in hidden else as_bytes(str(piece)) for i, piece in enumerate(pieces)]
    _check(tokenizer, data)
    return data + [b""] * (vocab_size - len(data))


def _is_byte_level(tokenizer: Any) -> bool:
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return False
    state = json.loads(decoder.__getstate__())
    return any(part["type"] == "ByteLevel" for part in (state, *state.get("decoders", ())))


_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


def _byte_level(piece: str) -> bytes:
    """Read a piece whose characters stand for bytes, as GPT-2's; others are themselves."""
    if all(character in _BYTES for character in piece):
        return bytes(_BYTES[character] for character in piece)
    return piece.encode(errors="replace")


def _sentence_piece(piece: str) -> bytes:
    """Read a piece of SentencePiece, where U+2581 is a space and <0x41> a byte."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            pass
    return piece.replace("\u2581", " ").encode(errors="replace")


def _check(tokenizer: Any, data: Sequence[bytes]) -> None:
    """Compare with what the tokenizer itself writes.

    Raises:
        ConfigError: If it differs.
    """
    whole = [i for i, one in enumerate(data) if one and "\ufffd" not in one.decode(errors="replace")]
    sample = whole[:: max(1, len(whole) // _NUM_CHECKED)]
    for start in range(0, len(sample), _CHECKED_TOGETHER):
        token_ids = sample[start : start + _CHECKED_TOGETHER]
        wanted = b"".join(data[i] for i in token_ids).decode()
        written = tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if written.lstrip() != wanted.lstrip():  # some drop the space before a text
            raise ConfigError(
                f"words can't be forbidden with this tokenizer, a {type(tokenizer).__name__}: it writes the tokens "
                f"{token_ids} as {written!r}, and not as {wanted!r}",
                hint="train a head with --forbid instead",
            )
