"""The protocols of a reward and of a rule, and their names."""

from __future__ import annotations

from typing import Any, Protocol


class Reward(Protocol):
    """Any callable with TRL's signature, `(prompts, completions, completion_ids, **columns) -> list[float | None]`.

    It is called with keywords and gets those that it names, or all if it takes `**kwargs`. Prompts and completions are
    strings if the prompts of the data are, else lists of `{"role", "content"}` messages. None means "no opinion". A
    coroutine function is awaited. An attribute `takes_partial_text = True` says that it can score unfinished replies
    too; then training learns what each token changes.

    Source: TRL, GRPOTrainer, "Using a custom reward function".
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Score a batch."""


class Rule(Protocol):
    """A rule that finds the spans of a text that break it; training labels tokens by them."""

    def violations(self, text: str) -> list[tuple[int, int]]:
        """Return the (start, end) character spans that break the rule, sorted; empty for a text that complies."""


class DescribedRule(Rule, Protocol):
    """A rule that is a reward, too: 1.0 for a reply that complies, else 0.0."""

    @property
    def described(self) -> str:
        """What is forbidden, as text for a message."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Score a batch; see `Reward`."""

    def spec(self) -> dict[str, Any]:
        """Return the JSON description of the rule."""


def takes_partial_text(reward: Reward) -> bool:
    """Return whether a reward can score unfinished replies; False if it does not say."""
    return bool(getattr(reward, "takes_partial_text", False))


def reward_name(reward: Reward) -> str:
    """Return the name of a reward in messages, metrics and charts."""
    return getattr(reward, "__name__", None) or type(reward).__name__


def reply_text(completion: Any) -> str:
    """Return the text of a completion, or of the last message of a prompt, in either form."""
    return str(completion if isinstance(completion, str) else completion[-1]["content"])


def short(value: Any) -> str:
    """Return a value as text that is short enough for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
