"""Words and phrases that must not appear, as a rule and as a reward."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from mara_integrations.errors import ConfigError
from mara_integrations.rewards.protocol import reply_text


class ForbiddenWords:
    """The rule that words or phrases must not appear; as a reward 1.0 for a reply that complies, else 0.0.

    Only whole words count: a word ends where letters and digits do, so forbidding "you" also finds "you're" and
    Markdown's "_you_", but not "young". Case does not count, nor do spellings that Unicode holds equal: "STRASSE" is
    found where "Straße" is forbidden. White space in a phrase matches any run of white space, a straight apostrophe
    also matches a curly one.

    An asterisk at either end stands for any letters and digits, or none: "refund*" also finds "refunds" and
    "refundable", "*berg" also "Heidelberg".

    Args:
        words: The words or phrases, at least one.

    Attributes:
        words: The words or phrases, in lower case.
        folded: The same ones as they are compared, without differences of case.

    Raises:
        ConfigError: If there is no word or one is blank.
    """

    takes_partial_text = True

    def __init__(self, words: str | Iterable[str]) -> None:
        given = [words] if isinstance(words, str) else list(words)
        folded: dict[str, str] = {}
        for word in given:
            plain = " ".join(word.lower().split())
            folded.setdefault(_folded(plain)[0], plain)
        self.words = tuple(folded.values())
        self.folded = tuple(folded)
        if not self.words or "" in self.words:
            raise ConfigError(
                f"forbidden words {given!r} are not allowed", hint="give at least one, none of them blank"
            )
        shown = [*self.words[:3], *(["…"] if len(self.words) > 3 else [])]
        self.__name__ = f"without {', '.join(shown)}"
        self._patterns = [re.compile(_whole_word(word)) for word in folded]

    @property
    def described(self) -> str:
        """The words, in quotation marks."""
        return ", ".join(map(repr, self.words))

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float | None]:
        """Return 1.0 for each completion that complies and 0.0 for each other; see `Reward`."""
        return [0.0 if self.violations(reply_text(item)) else 1.0 for item in completions]

    def violations(self, text: str) -> list[tuple[int, int]]:
        """Return the spans of all forbidden words, sorted; those of a phrase and of a word within it overlap."""
        folded, origins = _folded(text)
        matches = (match for pattern in self._patterns for match in pattern.finditer(folded))
        return sorted({(origins[match.start()], origins[match.end() - 1] + 1) for match in matches})

    def spec(self) -> dict[str, Any]:
        """Return the JSON description that `reward_from_spec` builds an equal rule from."""
        return {"kind": "forbidden_words", "words": list(self.words)}

    def __repr__(self) -> str:
        return f"ForbiddenWords({list(self.words)!r})"


def _folded(text: str) -> tuple[str, Sequence[int]]:
    """Return a text without differences of case, and for each of its characters the index of the one it came from.

    Source: canonical caseless matching, Unicode Standard, section 3.13, definition D145, character by character.
    """
    if text.isascii():
        return text.lower(), range(len(text))
    folded: list[str] = []
    origins: list[int] = []
    for index, character in enumerate(text):
        plain = folded_character(character)
        folded.append(plain)
        origins += [index] * len(plain)
    return "".join(folded), origins


@lru_cache(maxsize=4096)
def folded_character(character: str) -> str:
    """Return a character as it is compared: without its case, decomposed, so that it may become several."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", character).casefold())


_IN_WORD = r"[^\W_]|[\u0300-\u036f]"  # letters, digits, and the accents that decomposed letters carry


def is_in_word(character: str) -> bool:
    """Return whether a folded character is a letter, a digit, or an accent that a decomposed letter carries."""
    return character.isalnum() or "\u0300" <= character <= "\u036f"


def without_asterisks(word: str) -> tuple[str, bool, bool]:
    """Return a folded word without the asterisks that stand for letters, and whether one is before and behind it.

    An asterisk beside anything but a letter or a digit is itself: "**" forbids Markdown's bold.
    """
    before = len(word) > 1 and word[0] == "*" and is_in_word(word[1])
    behind = len(word) > 1 and word[-1] == "*" and is_in_word(word[-2])
    return word[before : len(word) - behind], before, behind


def has_edges(word: str) -> tuple[bool, bool]:
    """Return whether a folded word begins, and ends, only where no letter or digit goes on."""
    plain, is_open_before, is_open_behind = without_asterisks(word)
    # Not \b: it takes "_" for a letter, and finds no edge beside a word such as "c++".
    before, after = plain[0].isalnum(), unicodedata.category(plain[-1])[0] not in "PSC"
    return before and not is_open_before, after and not is_open_behind


def word_pattern(word: str) -> str:
    """Return the regular expression of a folded word or phrase, or of the rest of one, without its edges."""
    inner = r"\s+".join(re.escape(part) for part in re.split(" ", word))
    return inner.replace("'", "['\u2019]")


def _whole_word(word: str) -> str:
    before, after = has_edges(word)
    pattern = word_pattern(without_asterisks(word)[0])
    return f"{f'(?<!{_IN_WORD})' if before else ''}{pattern}{f'(?!{_IN_WORD})' if after else ''}"
