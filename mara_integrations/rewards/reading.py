"""How hard a text is to read: sentences, words and syllables, and the grade of an American school that reads it."""

from __future__ import annotations

import regex

# A mark that ends a sentence, and what may close behind it; not the point of a number, an initial or a short form.
_END = regex.compile(
    r"""(?<!\b(?:\p{Lu}|Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|No|approx|Jr|Sr)\.)
    (?<=[.!?…])["'”’)\]]*+(?=\s|$) | (?<=[。！？])["'”’」』）]*+""",
    regex.VERBOSE,
)
_WORDS = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}'’\-]*+")
_VOWELS = regex.compile(r"[aeiouy]+")


def sentences(text: str) -> list[str]:
    """Return the sentences of a text; what stands behind the last end is one, too."""
    parts, start = [], 0
    for match in _END.finditer(text):
        parts.append(text[start : match.end()])
        start = match.end()
    return [part.strip() for part in (*parts, text[start:]) if regex.search(r"\w", part)]


def count_syllables(word: str) -> int:
    """Return the syllables of an English word, as its spelling suggests: groups of vowels, but for silent ends."""
    plain = regex.sub(r"[^a-z]", "", word.casefold())
    count = len(_VOWELS.findall(plain))
    silent = regex.search(r"[^aeiouyl]e$|[^aeiouytd]ed$|[^aeiouycgsxz]es$", plain)
    return max(1, count - (silent is not None and count > 1))


def reading_grade(text: str) -> float:
    """Return the Flesch-Kincaid grade of an English text; 0 for one without words, and not below.

    Source: Kincaid et al. 1975, Derivation of new readability formulas for Navy enlisted personnel.
    """
    words = _WORDS.findall(text)
    if not words:
        return 0.0
    syllables = sum(map(count_syllables, words))
    return max(0.0, 0.39 * len(words) / max(1, len(sentences(text))) + 11.8 * syllables / len(words) - 15.59)
