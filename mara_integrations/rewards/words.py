"""Words and phrases that must not appear, as a rule and as a reward."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from mara_integrations.errors import ConfigError
from mara_integrations.rewards.protocol import reply_text


class ForbiddenWords:
    """The rule that words or phrases must not appear; as a reward 1.0 for a reply that complies, else 0.0.

    Only whole words count, in any case: a word ends where letters and digits do, so forbidding "you" also finds
    "you're" and Markdown's "_you_", but not "young". White space in a phrase matches any run of white space, a straight
    apostrophe the curly one too.

    Args:
        words: The words or phrases, at least one.

    Raises:
        ConfigError: If there is no word or one is blank.
    """

    takes_partial_text = True

    def __init__(self, words: str | Iterable[str]) -> None:
        given = [words] if isinstance(words, str) else list(words)
        self.words = tuple(dict.fromkeys(" ".join(word.split()).casefold() for word in given))
        if not self.words or "" in self.words:
            raise ConfigError(
                f"forbidden words {given!r} are not allowed", hint="give at least one, none of them blank"
            )
        shown = [*self.words[:3], *(["…"] if len(self.words) > 3 else [])]
        self.__name__ = f"without {', '.join(shown)}"
        self._patterns = [re.compile(_whole_word(word), re.IGNORECASE) for word in self.words]

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float | None]:
        """1.0 for each completion that complies, 0.0 for each other; see `Reward`."""
        return [0.0 if self.violations(reply_text(item)) else 1.0 for item in completions]

    def violations(self, text: str) -> list[tuple[int, int]]:
        """The spans of all forbidden words, sorted; those of a phrase and of a word within it overlap."""
        return sorted({match.span() for pattern in self._patterns for match in pattern.finditer(text)})

    def first_violation_end(self, text: str) -> int | None:
        """Where the first violation is complete, in characters; None for a text that complies."""
        return min((end for _, end in self.violations(text)), default=None)

    def spec(self) -> dict[str, Any]:
        """What `reward_from_spec` builds an equal rule from, as JSON can hold it."""
        return {"kind": "forbidden_words", "words": list(self.words)}

    def __repr__(self) -> str:
        return f"ForbiddenWords({list(self.words)!r})"


def _whole_word(word: str) -> str:
    # Not \b: it takes "_" for a letter, and finds no edge beside a word such as "c++".
    before = r"(?<![^\W_])" if word[0].isalnum() else ""
    after = r"(?![^\W_])" if word[-1].isalnum() else ""
    inner = r"\s+".join(re.escape(part) for part in word.split())
    return before + inner.replace("'", "['\u2019]") + after
