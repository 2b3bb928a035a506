"""The errors that callers get when their request fails to decode."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mara_integrations.errors import HeadError, MaraError, ModelError, in_one_line

# The part that failed, where a head did.
HEAD = "the head of this request"


def described(error: Exception, what: str, kind: type[MaraError] = ModelError) -> MaraError:
    """Return an error that says what failed, unless the given one already does.

    Args:
        error: What was raised.
        what: The part that failed.
        kind: The class of the error returned.
    """
    if isinstance(error, MaraError):
        return error
    if error.__traceback__ is not None:
        traceback.clear_frames(error.__traceback__)  # their local variables hold tensors
    reason = in_one_line(error)
    is_memory = type(error).__name__ == "OutOfMemoryError" or "allocate memory" in reason
    hint = "lower kv_bytes or max_live, or shorten the prompt" if is_memory else None
    wrapped = kind(f"{what} failed: {reason}", hint=hint)
    wrapped.__cause__ = error
    return wrapped


@contextmanager
def naming(what: str, kind: type[MaraError] = ModelError) -> Iterator[None]:
    """Turn any error in the block into one of ours that names the part that failed."""
    try:
        yield
    except Exception as error:
        raise described(error, what, kind) from error


def nonfinite(what: str) -> ModelError:
    """Return the error for numbers of the model that are NaN or infinite."""
    return ModelError(f"the model's {what} are not finite", hint="half precision may overflow: try float32")


def nonfinite_scores() -> HeadError:
    """Return the error for scores of a head that are NaN or infinite."""
    return HeadError("the scores of this request's head are not finite", hint="its weights are damaged or too large")
