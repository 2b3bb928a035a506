"""Rules by the notation of `--forbid` and `--require`: words, regular expressions, and ready ones by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import unquote

from mara_integrations.errors import ConfigError, RewardError
from mara_integrations.rewards.finders import FINDERS, PATTERNS, CheckedPattern, Finder
from mara_integrations.rewards.patterns import PATTERN_PREFIX, compiled, spans
from mara_integrations.rewards.protocol import DescribedRule, reply_text
from mara_integrations.rewards.words import ForbiddenWords

RULE_PREFIX = "rule:"


class TextRule:
    """The rule that a text must not have what a pattern or a ready finder finds; as a reward 1.0 or 0.0.

    Args:
        notation: `re:` and a regular expression of the package `regex`, or `rule:` and a name of `FINDERS`, with
            arguments as in `rule:long?words=60`.

    Raises:
        ConfigError: If it is not a regular expression, or an argument is not allowed.
        RewardError: If there is no such rule, or it takes other arguments.
    """

    takes_partial_text = True

    def __init__(self, notation: str) -> None:
        self._notation = notation
        if notation.startswith(PATTERN_PREFIX):
            pattern = _pattern_of(notation)
            compiled(pattern)
            self._find: Finder = partial(spans, pattern)
        else:
            self._find = _finder(notation.removeprefix(RULE_PREFIX))
        self.__name__ = f"without {notation}"

    @property
    def described(self) -> str:
        """The notation."""
        return self._notation

    def violations(self, text: str) -> list[tuple[int, int]]:
        """Return the spans of all matches.

        Raises:
            RewardError: If a pattern takes too long.
        """
        return self._find(text)

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float | None]:
        """Return 1.0 for each completion that complies and 0.0 for each other; see `Reward`."""
        return [0.0 if self.violations(reply_text(item)) else 1.0 for item in completions]

    def spec(self) -> dict[str, Any]:
        """Return the JSON description that `reward_from_spec` builds an equal rule from."""
        return {"kind": "rules", "rules": [self._notation]}


class SeveralRules:
    """Several rules as one: a text complies if it complies with each."""

    takes_partial_text = True

    def __init__(self, rules: Sequence[DescribedRule], notations: Sequence[str]) -> None:
        self._rules, self._notations = tuple(rules), tuple(notations)
        self.__name__ = f"without {', '.join([*self._notations[:3], *(['…'] if len(self._notations) > 3 else [])])}"

    @property
    def described(self) -> str:
        """The notations."""
        return ", ".join(rule.described for rule in self._rules)

    def violations(self, text: str) -> list[tuple[int, int]]:
        """Return the spans that break any of the rules, sorted; one that breaks two stands twice.

        Else their number could grow without a new violation, where two spans that were the same part.
        """
        return sorted(span for rule in self._rules for span in rule.violations(text))

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float | None]:
        """Return 1.0 for each completion that complies and 0.0 for each other; see `Reward`."""
        return [0.0 if self.violations(reply_text(item)) else 1.0 for item in completions]

    def spec(self) -> dict[str, Any]:
        """Return the JSON description that `reward_from_spec` builds an equal rule from."""
        return {"kind": "rules", "rules": list(self._notations)}


class Required:
    """1.0 for a reply that has what a rule finds, else 0.0: a word, `re:` and a pattern, or `rule:` and a name.

    Raises:
        ConfigError: See `parse_rule`.
        RewardError: See `parse_rule`.
    """

    takes_partial_text = True

    def __init__(self, what: str) -> None:
        self._what, self._rule = what, parse_rule([what])
        self.__name__ = f"with {what}"

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float | None]:
        """Return one score a completion; see `Reward`."""
        return [float(bool(self._rule.violations(reply_text(item)))) for item in completions]

    def spec(self) -> dict[str, Any]:
        """Return the JSON description that `reward_from_spec` builds an equal reward from."""
        return {"kind": "required", "what": self._what}


def parse_rule(texts: Sequence[str]) -> DescribedRule:
    """Return the rule that a text must have none of these.

    Args:
        texts: Words or phrases, see `ForbiddenWords`; or notations of `TextRule`.

    Raises:
        ConfigError: If a word is blank, a pattern is none, or an argument is not allowed.
        RewardError: If there is no such rule, or it takes other arguments.
    """
    words, special = split_notations(texts)
    if not special:
        return ForbiddenWords(words)
    rules: list[DescribedRule] = [*([ForbiddenWords(words)] if words else []), *map(TextRule, special)]
    return rules[0] if len(rules) == 1 else SeveralRules(rules, texts)


def split_notations(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words and phrases, and the notations of `TextRule`."""
    special = [text for text in texts if text.startswith((PATTERN_PREFIX, RULE_PREFIX))]
    return [text for text in texts if text not in special], special


def rule_patterns(notation: str) -> tuple[CheckedPattern, ...]:
    """Return the patterns that a notation of `TextRule` stands for.

    Raises:
        ConfigError: If it is not a regular expression, or a rule that no pattern tells.
        RewardError: If there is no such rule, or it takes other arguments.
    """
    if notation.startswith(PATTERN_PREFIX):
        return (CheckedPattern(compiled(_pattern_of(notation))),)
    _finder(notation.removeprefix(RULE_PREFIX))
    name = notation.removeprefix(RULE_PREFIX).partition("?")[0]
    if name not in PATTERNS:
        raise ConfigError(
            f"{notation!r} judges a text, and no pattern tells it", hint=f"rules of patterns are {', '.join(PATTERNS)}"
        )
    return PATTERNS[name]


def _pattern_of(notation: str) -> str:
    pattern = notation.removeprefix(PATTERN_PREFIX)
    if not pattern:
        raise ConfigError("pattern 're:' is empty", hint=r"for example re:\bas an AI\b")
    return pattern


def _finder(notation: str) -> Finder:
    name, _, query = notation.partition("?")
    if name not in FINDERS:
        raise RewardError(f"rule {name!r} is unknown", hint=f"there are {', '.join(FINDERS)}")
    arguments: Mapping[str, str] = {
        key: unquote(value) for key, _, value in (item.partition("=") for item in query.split("&") if item)
    }
    takes = inspect.signature(FINDERS[name]).parameters
    for key in arguments:
        if key not in takes:
            raise RewardError(f"rule {name!r} takes {', '.join(takes) or 'nothing'}; given is {key}")
    return FINDERS[name](**arguments)
