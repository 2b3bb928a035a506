"""A preference in words: a sentence that says how replies should be, and what its opposite is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mara_integrations.errors import ConfigError
from mara_integrations.messages import Conversation, Message

# Prompts of our own, for those who have none; README.md beside them says what they are.
VARIED_PROMPTS = Path(__file__).parent / "shipped" / "prompts.jsonl"
MAX_CHARS = 4_000
# What a system prompt changes whatever it says is no part of a principle.
NEUTRAL = "You are a helpful assistant."


@dataclass(frozen=True, slots=True)
class Principle:
    """A sentence, or several, and the opposite.

    Attributes:
        text: How replies should be, in the words of a system prompt.
        against: The opposite, in the same form.
        is_derived: Whether we made the opposite; otherwise it was given.
    """

    text: str
    against: str
    is_derived: bool


def make_principle(sentences: Sequence[str], file: Path | None = None, against: str | None = None) -> Principle | None:
    """Return the principle of some sentences and of a text file, in this order; None where there is neither.

    Raises:
        ConfigError: If the file can't be read, all is blank or too long, or there is an opposite of nothing.
    """
    texts = [*sentences, *(() if file is None else (_read(file),))]
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
    if against is None:
        return Principle(text, f"In everything you say, do the exact opposite of this:\n{text}", is_derived=True)
    return Principle(text, against.strip(), is_derived=False)


def under(sentence: str, prompt: Conversation) -> Conversation:
    """Return a prompt with a sentence as its system message, or behind the one that it has."""
    first, *others = prompt.messages
    if first.role != "system":
        return prompt.with_system(sentence)
    return Conversation((Message("system", f"{first.content}\n\n{sentence}"), *others), prompt.tools)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise ConfigError(f"the principle file {str(file)!r} can't be read: {reason}") from None
