"""How far a reply answers from documents: words that it shares with the answer, and whether it admits to have none."""

from __future__ import annotations

import regex

from mara_integrations.rewards.manner import find_missing_answers

_WORD = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}]*+")
# Words that any text may have.
_COMMON = frozenset(
    _WORD.findall(
        "a about after all also an and any are as at be been before but by can do does for from had "
        "has have he her his how i if in into is it its may more my no not of on or our she so some "
        "such than that the their them then there these they this to was we were what when where "
        "which who will with would you your "
    )
)


def share_answered(
    text: str, *, answer: str | None = None, context: str | None = None, sentence: str | None = None
) -> float:
    """Return the share of the answer's words that a reply has; without an answer, of the reply's that the context has.

    Common words do not count, unless there are no others. A reply that says there is no answer scores 0.
    """
    if is_admitted(text, sentence):
        return 0.0
    said, wanted = _words(text), _words(answer if answer is not None else context or "")
    if answer is None:
        said, wanted = wanted, said
    return len(wanted & said) / len(wanted) if wanted else 0.0


def is_admitted(text: str, sentence: str | None = None) -> bool:
    """Return whether a reply says that the documents do not hold the answer, in English or by this very sentence."""
    return bool(find_missing_answers(text)) or (sentence is not None and sentence.casefold() in text.casefold())


def _words(text: str) -> set[str]:
    words = {word.casefold() for word in _WORD.findall(text)}
    return words - _COMMON or words
