"""A preference in words: a sentence that says how replies should be, and what its opposite is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

from mara_integrations.errors import ConfigError
from mara_integrations.messages import Conversation, Message

# Prompts of our own, for those who have none; README.md beside them says what they are.
VARIED_PROMPTS = Path(__file__).parent / "shipped" / "prompts.jsonl"
MAX_CHARS = 4_000
# What a system prompt changes whatever it says is no part of a principle.
NEUTRAL = "You are a helpful assistant."
_WEIGHT = re.compile(r"(.*?)\s*=\s*([+-]?(?:\d+(?:\.\d+)?|\.\d+|nan|inf))\s*", re.DOTALL)
# Behind the end of a sentence, it was meant as a weight.
_NO_WEIGHT = re.compile(r".*[.!?…]\s*=\s*(\S*[^\s.!?…]|)\s*", re.DOTALL)

PrincipleLike: TypeAlias = "str | tuple[str, float]"  # a sentence, alone or with its weight


@dataclass(frozen=True, slots=True)
class Principle:
    """A sentence, or several, and the opposite.

    Attributes:
        text: How replies should be, in the words of a system prompt.
        against: The opposite, in the same form.
        is_derived: Whether we made the opposite; otherwise it was given.
        weighted: Sentences to read one by one, with their weights; empty where the text is read as a whole.
    """

    text: str
    against: str
    is_derived: bool
    weighted: tuple[tuple[str, float], ...] = ()

    @property
    def parts(self) -> tuple[tuple[str, float], ...]:
        """The system prompts of the principle, each with its weight: the weighted sentences, else the whole text."""
        return self.weighted or ((self.text, 1.0),)

    @property
    def sentences(self) -> tuple[str, ...]:
        """All system prompts that replies are written or read under, the neutral one included."""
        return (self.text, *(text for text, _ in self.weighted), self.against, NEUTRAL)

    @property
    def described(self) -> str:
        """The text, or a line for each weighted sentence."""
        return "\n".join(f"{weight:g} × {text}" for text, weight in self.weighted) or self.text


def make_principle(sentences: Sequence[str], file: Path | None = None, against: str | None = None) -> Principle | None:
    """Return the principle of some sentences and of a text file, in this order; None where there is neither.

    Args:
        sentences: Each with its weight where it has one, as in `Be warm.=0.5`. Without weights, all are one text.
        file: Text without weights.
        against: The opposite of all.

    Raises:
        ConfigError: If the file can't be read, all is blank or too long, a weight is not allowed, or there is an
            opposite of nothing or of weighted sentences.
    """
    weighted = [*map(_weighted, sentences), *(() if file is None else ((_read(file), None),))]
    texts = [text for text, _ in weighted]
    if not texts:
        if against is not None:
            raise ConfigError(f"against={against!r} has no principle to be the opposite of", hint="give a principle")
        return None
    for name, value in [*(("principle", text) for text in texts), ("against", "-" if against is None else against)]:
        if not value.strip():
            raise ConfigError(f"{name}={value!r} is blank", hint="a sentence, such as 'Be warm and brief.'")
    text = "\n".join(each.strip() for each in texts)
    if max(len(text), len(against or "")) > MAX_CHARS:
        raise ConfigError(f"a principle has at most {MAX_CHARS} characters, this one {len(text)}", hint="shorten it")
    has_weights = any(weight is not None for _, weight in weighted)
    if has_weights and against is not None:
        raise ConfigError(
            f"against={against!r} is not allowed beside sentences with weights, each of which is read by itself",
            hint="leave it out, or the weights",
        )
    parts = tuple((each.strip(), 1.0 if weight is None else weight) for each, weight in weighted) if has_weights else ()
    if against is None:
        opposite = f"In everything you say, do the exact opposite of this:\n{text}"
        return Principle(text, opposite, is_derived=True, weighted=parts)
    return Principle(text, against.strip(), is_derived=False)


def notations(given: PrincipleLike | Sequence[PrincipleLike]) -> tuple[str, ...]:
    """Return what Python code may give, one or several sentences or pairs with a weight, as a command line has it."""
    is_one = isinstance(given, str) or (len(given) == 2 and isinstance(given[1], int | float))
    several = cast("Sequence[PrincipleLike]", [given] if is_one else given)
    return tuple(each if isinstance(each, str) else f"{each[0]}={each[1]}" for each in several)


def under(sentence: str, prompt: Conversation) -> Conversation:
    """Return a prompt with a sentence as its system message, or behind the one that it has."""
    first, *others = prompt.messages
    if first.role != "system":
        return prompt.with_system(sentence)
    return Conversation((Message("system", f"{first.content}\n\n{sentence}"), *others), prompt.tools)


def _weighted(notation: str) -> tuple[str, float | None]:
    """Return a sentence and its weight, None where it has none.

    Raises:
        ConfigError: If the weight is not a number above 0.
    """
    found = _WEIGHT.fullmatch(notation)
    if found is None:
        wrong = _NO_WEIGHT.fullmatch(notation)
    elif 0.0 < float(found[2]) < math.inf:
        return found[1], float(found[2])
    else:
        wrong = found
    if wrong is not None:
        raise ConfigError(
            f"principle={notation!r}: weight {wrong[wrong.re.groups]!r} is not allowed",
            hint="a number above 0, as in 'Be warm.=0.5'; what replies should not be, say in words",
        )
    return notation, None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ConfigError(f"the principle file {str(file)!r} can't be read: {reason}") from None
