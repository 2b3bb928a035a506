"""Errors in the form of OpenAI's API: status, type, message and code; and the status of each of our errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json

from mara_integrations.errors import (
    ConfigError,
    ContextLengthError,
    EngineClosedError,
    HeadError,
    MissingExtraError,
    ModelError,
)

CLIENT_CLOSED = 499  # nginx's code; the client closed the connection, so nobody reads this answer
RETRY_AFTER_S = 1

_MAX_MESSAGE_CHARS = 500
_MAX_VALUE_CHARS = 60
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class RefusalError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: What is wrong with the request; long ones are cut in the middle.
        code: Machine-readable reason, as clients compare it.
        param: Field of the body that is at fault.
        headers: Further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.message = _cut(message, _MAX_MESSAGE_CHARS)
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("retry-after", str(RETRY_AFTER_S))

    def as_dict(self) -> dict[str, Any]:
        """Return the body of the answer."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def as_bytes(self) -> bytes:
        """Return the body of the answer as JSON."""
        return to_json(self.as_dict())


class ClientClosedError(RefusalError):
    """The client closed the connection before its answer was complete."""

    def __init__(self) -> None:
        super().__init__(CLIENT_CLOSED, "the client closed the connection")


def refusal_of(error: BaseException) -> RefusalError:
    """Return the answer to a request that raised `error`.

    An error that the request caused is answered in full. Of an error of the server, only the kind is answered: its text
    may name files of this machine, so it goes to the log.
    """
    if isinstance(error, RefusalError):
        return error
    if isinstance(error, ContextLengthError):
        return RefusalError(400, str(error), code="context_length_exceeded")
    if isinstance(error, EngineClosedError):
        return RefusalError(503, "the engine is closed: it takes no more requests", code="engine_closed")
    if isinstance(error, ConfigError | MissingExtraError):
        return RefusalError(400, str(error))
    if isinstance(error, HeadError):
        return RefusalError(500, "the head can't be used; the server's log says why", code="head_error")
    if isinstance(error, ModelError):
        return RefusalError(500, "the model failed; the server's log says why", code="model_error")
    name = type(error).__name__
    return RefusalError(500, f"the server failed with {name}; its log says why", code="internal_error")


def is_fault_of_server(error: BaseException) -> bool:
    """Return whether an error belongs in the log, because the answer does not tell it."""
    return refusal_of(error).status >= 500 and not isinstance(error, RefusalError)


def shown(value: object) -> str:
    """Return a value of a request for a message: its `repr`, cut in the middle."""
    if isinstance(value, int) and abs(value) > 10**_MAX_VALUE_CHARS:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        return repr(_cut(value, _MAX_VALUE_CHARS))
    try:
        return _cut(repr(value), _MAX_VALUE_CHARS)
    except (ValueError, RecursionError):  # an integer that Python refuses to write, deep inside
        return f"a {type(value).__name__}"


def _cut(text: str, num_chars: int) -> str:
    if len(text) <= num_chars:
        return text
    half = (num_chars - 3) // 2
    return f"{text[:half]}...{text[-half:]}"
