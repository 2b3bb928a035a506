"""Built-in rewards: length, a pattern, forbidden words, JSON, sentiment, toxicity."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from mara_integrations.errors import ConfigError, MissingExtraError, RewardError
from mara_integrations.rewards.protocol import Reward, reply_text
from mara_integrations.rewards.words import ForbiddenWords


class _Named:
    """A built-in reward with the name and the arguments that a command line gives it."""

    takes_partial_text = True

    def __init__(self, name: str, **arguments: str) -> None:
        self.__name__, self._arguments = name, arguments

    def spec(self) -> dict[str, Any]:
        """Return the JSON description that `reward_from_spec` builds an equal reward from."""
        return {"kind": "ready", "name": self.__name__, "arguments": self._arguments}


class _OfText(_Named, ABC):
    """A built-in reward that scores the text of each reply by itself."""

    @abstractmethod
    def judge(self, text: str) -> float:
        """Return the score of one reply."""

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float | None]:
        """Return one score a completion; see `Reward`."""
        return [self.judge(reply_text(completion)) for completion in completions]


class Length(_OfText):
    """Closeness of a reply to a number of words: 0 at that number, -1 at none or at twice as many."""

    def __init__(self, words: str = "40") -> None:
        super().__init__("length", words=words)
        if not words.isdigit() or int(words) < 1:
            raise ConfigError(f"length?words={words} is not allowed", hint="a number of words, at least 1")
        self._words = int(words)

    def judge(self, text: str) -> float:
        """Return minus the difference, as a share of the words wanted."""
        return -abs(len(text.split()) - self._words) / self._words


class Regex(_OfText):
    """1 for a reply that matches a pattern anywhere, else 0."""

    def __init__(self, pattern: str) -> None:
        super().__init__("regex", pattern=pattern)
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"regex?pattern={pattern} is no regular expression: {error}") from None

    def judge(self, text: str) -> float:
        """Return whether the pattern is found."""
        return float(self._pattern.search(text) is not None)


class Json(_OfText):
    """1 for a reply that is one JSON value and nothing else, else 0."""

    takes_partial_text = False  # half of a valid text is invalid

    def __init__(self) -> None:
        super().__init__("json")

    def judge(self, text: str) -> float:
        """Return whether the text is JSON."""
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return 0.0
        return 1.0


class Sentiment(_OfText):
    """Sentiment of a reply, from -1 (negative) to 1 (positive).

    Source: VADER's compound score (Hutto and Gilbert 2014).
    """

    def __init__(self) -> None:
        super().__init__("sentiment")
        module = _extra("vaderSentiment.vaderSentiment", "sentiment", "pip install 'mara-integrations[quality]'")
        self._analyzer = module.SentimentIntensityAnalyzer()

    def judge(self, text: str) -> float:
        """Return VADER's compound score."""
        return float(self._analyzer.polarity_scores(text)["compound"])


class Toxicity(_Named):
    """Minus the probability that a reply is toxic.

    Source: Detoxify's models (Hanu 2020); the weights are downloaded on the first call.
    """

    def __init__(self, model: str = "original") -> None:
        super().__init__("toxicity", model=model)
        self._module = _extra("detoxify", "toxicity", "pip install 'mara-integrations[toxicity]'")
        self._model = model

    @cached_property
    def _detector(self) -> Any:
        return self._module.Detoxify(self._model)

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float | None]:
        """Score the whole batch at once."""
        found = self._detector.predict([reply_text(completion) for completion in completions])
        return [-float(probability) for probability in found["toxicity"]]


def _extra(module: str, name: str, hint: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"reward {name!r} needs {module.partition('.')[0]}", hint=hint) from error


def _forbidden(words: str) -> ForbiddenWords:
    return ForbiddenWords(words.split(","))


READY: dict[str, Callable[..., Reward]] = {
    "length": Length,
    "regex": Regex,
    "forbidden-words": _forbidden,
    "json": Json,
    "sentiment": Sentiment,
    "toxicity": Toxicity,
}


def ready_reward(name: str, arguments: Mapping[str, str]) -> Reward:
    """Return a built-in reward.

    Raises:
        RewardError: If there is none of that name, or it takes other arguments.
        ConfigError: If an argument is not allowed.
        MissingExtraError: If a package that it needs is not installed.
    """
    if name not in READY:
        raise RewardError(f"reward {name!r} is unknown", hint=f"by name there are {', '.join(READY)}")
    try:
        return READY[name](**arguments)
    except TypeError:
        takes = ", ".join(inspect.signature(READY[name]).parameters)
        given = ", ".join(arguments) or "nothing"
        raise RewardError(f"reward {name!r} takes {takes or 'nothing'}; given is {given}") from None
