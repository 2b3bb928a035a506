"""Every error this package raises: one tree, each class with a hint, each leaf also the standard type it refines."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """Escape all control characters but tabs and line breaks: text from a file must not drive a terminal."""
    return "".join(
        repr(character)[1:-1] if unicodedata.category(character)[0] == "C" and character not in "\t\n" else character
        for character in text
    )


class MaraError(Exception):
    """Base of all our errors.

    Args:
        message: What was wrong, with the value that was given; control characters in it are escaped.
        hint: What to do about it, one short clause; None when the message says it all.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(printable(message))
        self.message = printable(message)
        self.hint = hint and printable(hint)

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message


class ConfigError(MaraError, ValueError):
    """A setting has a value that is not allowed."""


class ContextLengthError(ConfigError):
    """A prompt is longer than the model's context window."""


class ModelError(MaraError, ValueError):
    """A base model can't be found, loaded, or driven by this engine."""


class UnsupportedModelError(ModelError):
    """An engine can't run a kind of model that another engine may run."""


class HeadError(MaraError, ValueError):
    """A head can't be found, read, or does not fit the base model."""


class ShapeError(MaraError, ValueError):
    """A tensor has a shape the maths does not allow."""


class DataError(MaraError, ValueError):
    """A data file is missing, empty or malformed; the message names file and line."""


class RewardError(MaraError, ValueError):
    """A reward function can't be imported, raised, or returned the wrong thing."""


class CallBudgetError(MaraError, RuntimeError):
    """Judges have made as many paid calls as they may; what they said so far is kept."""


class OutputError(MaraError, OSError):
    """A result can't be written where it was asked for."""


class EngineClosedError(MaraError, RuntimeError):
    """A request came after the engine was closed, or its worker has died."""


class ServerError(MaraError, ConnectionError):
    """A server can't be reached, refuses to answer, or fails while it answers."""


class CutReplyError(MaraError, ValueError):
    """A reply that had to be whole, as an object of a schema has, was cut by `max_tokens`."""


class MissingExtraError(MaraError, ImportError):
    """An optional dependency is absent; the hint names the extra that brings it."""


def in_one_line(error: BaseException) -> str:
    """Return an error's class and the first line of its message."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
