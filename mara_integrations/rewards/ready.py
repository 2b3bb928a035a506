"""Built-in rewards: length, patterns, words, rules, reading level, language, IFEval, JSON, sentiment, toxicity."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any
from urllib.parse import quote

from mara_integrations.errors import ConfigError, MissingExtraError, RewardError
from mara_integrations.rewards.finders import FINDERS
from mara_integrations.rewards.grounding import is_admitted, share_answered
from mara_integrations.rewards.ifeval import follows, share_followed
from mara_integrations.rewards.language import checked_language, language_probability, same_language_probability
from mara_integrations.rewards.patterns import compiled, is_found
from mara_integrations.rewards.protocol import Reward, reply_text
from mara_integrations.rewards.reading import reading_grade
from mara_integrations.rewards.rules import RULE_PREFIX, Required, TextRule
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
        compiled(pattern)
        self._pattern = pattern

    def judge(self, text: str) -> float:
        """Return whether the pattern is found."""
        return float(is_found(self._pattern, text))


class ReadingLevel(_OfText):
    """Minus the grades by which an English reply is harder to read than wanted; 0 where it is not harder."""

    def __init__(self, grade: str = "8") -> None:
        super().__init__("reading-level", grade=grade)
        if not grade.isdecimal() or int(grade) < 1:
            raise ConfigError(f"reading-level?grade={grade} is not allowed", hint="a grade of a school, at least 1")
        self._grade = int(grade)

    def judge(self, text: str) -> float:
        """Return the difference to the Flesch-Kincaid grade."""
        return min(0.0, self._grade - reading_grade(text))


class Language(_Named):
    """Probability that a reply is in a language, by py3langid; of a few letters, hardly any language is probable.

    Args:
        code: The language in ISO 639-1; None is that of the prompt, by its last message.
    """

    def __init__(self, code: str | None = None) -> None:
        super().__init__("language", **({} if code is None else {"code": code}))
        checked_language("en" if code is None else code)  # whether the detector is there, in any case
        self._code = code

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float | None]:
        """Return one score a completion; see `Reward`."""
        replies = [reply_text(completion) for completion in completions]
        if self._code is not None:
            return [language_probability(reply, self._code) for reply in replies]
        asked = [reply_text(prompt) for prompt in prompts]
        return [same_language_probability(reply, text) for reply, text in zip(replies, asked, strict=True)]


class IFEval(_Named):
    """Share of IFEval's instructions that a reply follows: one that is named, or those of each row.

    Args:
        instruction: Name of one instruction; None reads the columns `instruction_id_list` and `kwargs` of the data.
        arguments: Arguments of that instruction.
    """

    takes_partial_text = False

    def __init__(self, instruction: str | None = None, **arguments: str) -> None:
        given = {} if instruction is None else {"instruction": instruction}
        super().__init__("ifeval", **given, **arguments)
        if instruction is None and arguments:
            raise RewardError(f"ifeval?{next(iter(arguments))}: name the instruction, too")
        if instruction is not None:
            follows("?", instruction, arguments)
        self._instruction, self._given = instruction, arguments

    def __call__(
        self,
        completions: Sequence[Any],
        instruction_id_list: Sequence[Any] | None = None,
        kwargs: Sequence[Any] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Return one score a completion; see `Reward`."""
        texts = [reply_text(completion) for completion in completions]
        if self._instruction is not None:
            return [float(follows(text, self._instruction, self._given)) for text in texts]
        if instruction_id_list is None:
            raise RewardError(
                "reward 'ifeval' needs the column instruction_id_list, which the data does not have",
                hint="or name one instruction: ifeval?instruction=punctuation:no_comma",
            )
        arguments = kwargs if kwargs is not None else [None] * len(texts)
        rows = zip(texts, instruction_id_list, arguments, strict=True)
        return [share_followed(text, names or (), given) for text, names, given in rows]


class Answered(_Named):
    """Of questions whose documents hold the answer: the share of the answer's words that a reply has.

    It needs columns of the data: `answerable`, and `answer`, or without that `context`: then it is the share of the
    reply's own words that the documents have. A reply that says there is no answer scores 0. There is no opinion on
    questions whose documents do not hold the answer.

    Args:
        sentence: A sentence that says that there is no answer. The phrases of `rule:missing-answer` say so, too.
    """

    def __init__(self, sentence: str | None = None) -> None:
        super().__init__("answered")
        self.sentence = sentence

    def __call__(
        self,
        completions: Sequence[Any],
        answerable: Sequence[Any] | None = None,
        answer: Sequence[Any] | None = None,
        context: Sequence[Any] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Return one score a completion; see `Reward`."""
        texts, flags = [reply_text(completion) for completion in completions], _flags("answered", answerable)
        references = zip(answer or [None] * len(texts), context or [None] * len(texts), strict=True)
        return [
            share_answered(text, answer=own, context=documents, sentence=self.sentence) if flag else None
            for text, flag, (own, documents) in zip(texts, flags, references, strict=True)
        ]


class Admitted(_Named):
    """Of questions whose documents do not hold the answer: 1 for a reply that says so, else 0.

    It goes by `rule:missing-answer`, and needs the column `answerable`.

    Args:
        sentence: A sentence that says so, too.
    """

    def __init__(self, sentence: str | None = None) -> None:
        super().__init__("admitted")
        self.sentence = sentence

    def __call__(
        self, completions: Sequence[Any], answerable: Sequence[Any] | None = None, **_: Any
    ) -> list[float | None]:
        """Return one score a completion; see `Reward`."""
        texts, flags = [reply_text(completion) for completion in completions], _flags("admitted", answerable)
        return [
            None if flag else float(is_admitted(text, self.sentence)) for text, flag in zip(texts, flags, strict=True)
        ]


def about_documents(judges: Mapping[str, Reward], sentence: str | None) -> dict[str, Reward]:
    """Return judges of questions with documents: those given, or `answered` and `admitted` where there are none.

    Args:
        judges: Judges by name.
        sentence: The sentence that a head was taught for a missing answer, if it is known.
    """
    if not judges:
        return {"answered": Answered(sentence), "admitted": Admitted(sentence)}
    return {
        name: type(judge)(sentence) if isinstance(judge, Answered | Admitted) else judge
        for name, judge in judges.items()
    }


def _flags(name: str, answerable: Sequence[Any] | None) -> list[bool]:
    if answerable is None:
        raise RewardError(
            f"reward {name!r} needs the column answerable, which the data does not have",
            hint="method grounding makes it, of questions with a column context",
        )
    return [bool(flag) for flag in answerable]


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


def _without(name: str, **arguments: str) -> TextRule:
    query = "&".join(f"{key}={quote(value)}" for key, value in arguments.items())
    return TextRule(f"{RULE_PREFIX}{name}{'?' if query else ''}{query}")


READY: dict[str, Callable[..., Reward]] = {
    "length": Length,
    "regex": Regex,
    "forbidden-words": _forbidden,
    "required": Required,
    **{f"no-{name}": partial(_without, name) for name in FINDERS},
    "reading-level": ReadingLevel,
    "language": Language,
    "ifeval": IFEval,
    "answered": Answered,
    "admitted": Admitted,
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
        near = difflib.get_close_matches(name, READY, n=1)
        there_are = f"by name there are {', '.join(READY)}; a function of yours is file.py:function or module:function"
        raise RewardError(f"reward {name!r} is unknown", hint=f"did you mean {near[0]}?" if near else there_are)
    try:
        return READY[name](**arguments)
    except TypeError:
        takes = ", ".join(inspect.signature(READY[name]).parameters)
        given = ", ".join(arguments) or "nothing"
        raise RewardError(f"reward {name!r} takes {takes or 'nothing'}; given is {given}") from None
