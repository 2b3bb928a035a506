"""Tasks where context decides: what a token is worth depends on the text before it, so that no list of words will do.

Each has a reward that takes partial text and a checker that says yes or no, neither of them a lexicon.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_SENTENCE = re.compile(r"[^.!?\n]*\w[^.!?\n]*(?:[.!?]+|\n|$)")
_NUMBER = r"(?:\d|(?:one|two|three|four|five|six|seven|eight|nine|ten|twelve|fifteen|twenty|thirty|forty|fifty)\b)"
_ABOUT = r"\b(?:about|around|approximately|roughly|nearly|over)"
_ABOUT_A_NUMBER = re.compile(rf"{_ABOUT}\s+(?:[$€£]\s*)?{_NUMBER}", re.IGNORECASE)


@dataclass(frozen=True)
class ContextTask:
    """A task.

    Attributes:
        name: Name on the command line.
        reward: Reward with TRL's signature that takes partial text.
        complies: Whether a reply does what is wanted.
        system_prompt: System prompt of the application; None is none.
        prompts: Prompts to train on and to test with; None is those of the sentiment task.
        max_reply_tokens: Length of a reply.
    """

    name: str
    reward: Callable[..., list[float]]
    complies: Callable[[str], bool]
    system_prompt: str | None = None
    prompts: tuple[list[str], list[str]] | None = None
    max_reply_tokens: int = 40

    def share(self, completions: Sequence[Any], **_: Any) -> list[float]:
        """The checker as a judge: 1 for a reply that complies, else 0."""
        return [float(self.complies(text(completion))) for completion in completions]


def text(completion: Any) -> str:
    """The text of a completion in either form of TRL."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def sentences(reply: str) -> list[str]:
    """Sentences of a reply, the last one finished or not."""
    return [match.group() for match in _SENTENCE.finditer(reply)]


def partial(function: Callable[[str], float]) -> Callable[..., list[float]]:
    """A reward of one text at a time that takes partial text."""

    def reward(completions: Sequence[Any], **_: Any) -> list[float]:
        return [function(text(completion)) for completion in completions]

    reward.__name__ = function.__name__
    reward.takes_partial_text = True  # type: ignore[attr-defined]
    return reward


def ten_words(reply: str) -> float:
    """Minus a twentieth for each word past the tenth of a sentence."""
    return -sum(max(0, len(sentence.split()) - 10) for sentence in sentences(reply)) / 20


def is_ten_words(reply: str) -> bool:
    """No sentence has more than ten words."""
    return all(len(sentence.split()) <= 10 for sentence in sentences(reply))


def two_sentences(reply: str) -> float:
    """Minus one for each sentence past the second."""
    return -float(max(0, len(sentences(reply)) - 2))


def is_two_sentences(reply: str) -> bool:
    """At most two sentences."""
    return len(sentences(reply)) <= 2


def question(reply: str) -> float:
    """1 while the text ends with a question."""
    return float(reply.rstrip().endswith("?"))


def is_question(reply: str) -> bool:
    """The reply ends with a question."""
    return reply.rstrip().endswith("?")


def no_number(reply: str) -> float:
    """Minus one for each number right after "about" or a word like it."""
    return -float(len(_ABOUT_A_NUMBER.findall(reply)))


def is_no_number(reply: str) -> bool:
    """No number right after "about" or a word like it."""
    return not _ABOUT_A_NUMBER.search(reply)


def _quantities() -> tuple[list[str], list[str]]:
    """Questions for amounts: to train on and to test with, none in both."""
    asked = [
        "How many people live in {}?", "How far is it from London to {}?", "How long is a flight to {}?",
        "What does a week in {} cost?", "How old is the city of {}?", "How high is the tallest tower of {}?",
        "How warm is it in {} in July?", "How many museums are there in {}?",
    ]  # fmt: skip
    places = [
        "Paris",
        "Rome",
        "Berlin",
        "Madrid",
        "Vienna",
        "Prague",
        "Warsaw",
        "Athens",
        "Dublin",
        "Oslo",
        "Lisbon",
        "Cairo",
        "Delhi",
        "Tokyo",
        "Seoul",
        "Lima",
        "Boston",
        "Chicago",
        "Denver",
        "Dallas",
        "Toronto",
        "Sydney",
        "Naples",
        "Milan",
        "Porto",
        "Bergen",
        "Geneva",
        "Munich",
        "Krakow",
        "Budapest",
    ]
    test_places, train_places = places[:8], places[8:]
    return tuple(
        [question.format(place) for place, question in itertools.product(side, asked)]
        for side in (train_places, test_places)
    )  # type: ignore[return-value]


TASKS = {
    task.name: task
    for task in (
        ContextTask("ten-words", partial(ten_words), is_ten_words),
        ContextTask("two-sentences", partial(two_sentences), is_two_sentences, max_reply_tokens=64),
        ContextTask(
            "question", partial(question), is_question, max_reply_tokens=64,
            system_prompt="Answer in one short sentence. Then ask one short question back.",
        ),
        ContextTask("no-number", partial(no_number), is_no_number, prompts=_quantities()),
    )
}  # fmt: skip
