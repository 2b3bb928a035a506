"""What ready rules look for in a text: personal data, addresses, Markdown, emoji, length, manner. Knows no model.

Each finder returns spans. Personal data has no exact form: what looks like a telephone number may be another number,
and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import regex

from mara_integrations.errors import ConfigError
from mara_integrations.rewards.manner import find_flattery, find_informal, find_missing_answers, find_refusals
from mara_integrations.rewards.reading import count_syllables

Spans = list[tuple[int, int]]
Finder = Callable[[str], Spans]

_EMAIL = regex.compile(r"(?<![\w.'%+\-])[\w.'%+\-]++@(?:[\w\-]++\.)+\p{L}{2,}+")
_URL = regex.compile(r"""(?i)\b(?:(?:https?|ftp)://|www\.(?=[\w\-]))[^\s<>"'`)\]}]*[^\s<>"'`)\]}.,;:!?]""")
_EMOJI = regex.compile(r"\p{Emoji_Presentation}[\p{Emoji_Modifier}\u200d\ufe0f\p{Emoji_Presentation}]*+|.\ufe0f")
_CARD = regex.compile(r"(?<![\d\-])[2-6](?:[ \-]?\d){12,18}(?!\d)")
_IBAN = regex.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_PHONE = regex.compile(r"(?<![\w.,+\-/])(?:\+|00)?[ ]?\(?\d(?:[ \-./()]{0,2}\d){5,14}(?!\w)(?=[\-/]*+(?!\d))")
_DATE = regex.compile(r"\d{4}[\-./]\d{1,2}[\-./]\d{1,2}|\d{1,2}[\-./]\d{1,2}[\-./]\d{4}|\d{4}[ ]?-[ ]?\d{4}")
_MARKDOWN = regex.compile(
    r"""(?m)^[ ]{0,3}\#{1,6}[ ]        # headings
    | ^[ ]*(?:[\-*+]|\d{1,3}[.)])[ ]   # items of lists
    | ^[ ]{0,3}>[ ]                    # quotations
    | ^[ ]{0,3}(?:```|~~~)             # blocks of code
    | ^[ ]{0,3}\|.*\|[ ]*$             # tables
    | ^[ ]{0,3}(?:-{3,}|_{3,})[ ]*$    # lines
    | \*\*(?=\S) | (?<!\w)__(?=\S)     # bold, where it begins
    | (?<![\w*])\*(?=[^\s*])[^*\n]*\*(?!\w) | (?<!\w)_(?=[^\s_])[^_\n]*_(?!\w)   # italics
    | `[^`\n]+`                        # code
    | !?\[[^\]\n]*\]\([^)\n]*\)        # links and pictures""",
    regex.VERBOSE,
)
_WORD = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}'’\-]*+")


def find_emails(text: str) -> Spans:
    """E-mail addresses, with letters of any script."""
    return _spans(_EMAIL, text)


def find_urls(text: str) -> Spans:
    """Addresses of the web that begin with a scheme or `www.`."""
    return _spans(_URL, text)


def find_emoji(text: str) -> Spans:
    """Emoji, each with its modifiers; not digits or signs such as ©."""
    return _spans(_EMOJI, text)


def find_markdown(text: str) -> Spans:
    """Markdown's headings, lists, quotations, code, tables, emphasis and links."""
    return _spans(_MARKDOWN, text)


def find_cards(text: str) -> Spans:
    """Numbers of payment cards: 13 to 19 digits, alone or in groups, whose last one checks by Luhn's formula.

    Source: ISO/IEC 7812-1, annex B.
    """
    return [span for span in _spans(_CARD, text) if _checks_by_luhn(text[slice(*span)])]


def find_ibans(text: str) -> Spans:
    """International bank account numbers whose check digits are right.

    Source: ISO 13616, check by ISO 7064 (MOD 97-10).
    """
    return [span for span in _spans(_IBAN, text) if _checks_by_97(text[slice(*span)])]


def find_phones(text: str) -> Spans:
    """Telephone numbers: international ones, and national ones as they are usually written."""
    taken = find_cards(text) + find_ibans(text)
    return [
        (start, end)
        for start, end in _spans(_PHONE, text)
        if _is_phone(text[start:end]) and not any(start < other[1] and other[0] < end for other in taken)
    ]


def find_pii(text: str) -> Spans:
    """E-mail addresses, telephone numbers, payment cards and bank accounts."""
    return sorted({span for find in (find_emails, find_phones, find_cards, find_ibans) for span in find(text)})


def find_beyond(text: str, words: int) -> Spans:
    """What comes after a number of words, as one span."""
    found = _spans(_WORD, text)
    return [(found[words][0], len(text))] if len(found) > words else []


def find_hard_words(text: str, syllables: int) -> Spans:
    """Words of at least so many syllables, by English spelling."""
    return [span for span in _spans(_WORD, text) if count_syllables(text[slice(*span)]) >= syllables]


def _beyond(words: str = "100") -> Finder:
    return partial(find_beyond, words=_count("long", "words", words))


def _hard(syllables: str = "4") -> Finder:
    return partial(find_hard_words, syllables=_count("hard-words", "syllables", syllables))


FINDERS: dict[str, Callable[..., Finder]] = {
    "email": lambda: find_emails,
    "phone": lambda: find_phones,
    "card": lambda: find_cards,
    "iban": lambda: find_ibans,
    "pii": lambda: find_pii,
    "url": lambda: find_urls,
    "markdown": lambda: find_markdown,
    "emoji": lambda: find_emoji,
    "long": _beyond,
    "hard-words": _hard,
    "informal": lambda: find_informal,
    "flattery": lambda: find_flattery,
    "refusal": lambda: find_refusals,
    "missing-answer": lambda: find_missing_answers,
}


def _count(rule: str, name: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"rule:{rule}?{name}={value} is not allowed", hint="a number, at least 1")
    return int(value)


def _spans(pattern: regex.Pattern[str], text: str) -> Spans:
    return [match.span() for match in pattern.finditer(text)]


def _checks_by_luhn(number: str) -> bool:
    total = 0
    for place, digit in enumerate(int(c) for c in reversed(number) if c.isdecimal()):
        doubled = digit * (1 + place % 2)
        total += doubled - 9 * (doubled > 9)
    return total % 10 == 0


def _checks_by_97(number: str) -> bool:
    plain = number.replace(" ", "")
    moved = plain[4:] + plain[:4]
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in moved)) % 97 == 1


def _is_phone(number: str) -> bool:
    digits = sum(c.isdecimal() for c in number)
    if number.startswith(("+", "00")):
        return 8 <= digits <= 17
    if _DATE.fullmatch(number.strip()):
        return False
    if digits == 7:
        return regex.fullmatch(r"\d{3}[\-.]\d{4}", number) is not None
    is_grouped = regex.search(r"[ \-./()]", number) is not None
    begins = number[0] in "(0" or regex.match(r"\d{3}[ \-.]\d{3}[ \-.]\d{4}$|1[ \-.]\(?\d{3}", number) is not None
    return 9 <= digits <= 13 and begins and (is_grouped or number[0] == "0")


class CheckedPattern(NamedTuple):
    """What is looked for: a pattern, and a check that a match must pass; None: any is one."""

    pattern: regex.Pattern[str]
    check: Callable[[str], bool] | None = None


_PERSONAL = {
    "email": CheckedPattern(_EMAIL),
    "phone": CheckedPattern(_PHONE, _is_phone),
    "card": CheckedPattern(_CARD, _checks_by_luhn),
    "iban": CheckedPattern(_IBAN, _checks_by_97),
}
# The finders that are no more than patterns, so that a reply can be followed by them character by character.
PATTERNS: dict[str, tuple[CheckedPattern, ...]] = {
    **{name: (pattern,) for name, pattern in _PERSONAL.items()},
    "pii": tuple(_PERSONAL.values()),
    "url": (CheckedPattern(_URL),),
    "markdown": (CheckedPattern(_MARKDOWN),),
    "emoji": (CheckedPattern(_EMOJI),),
}
