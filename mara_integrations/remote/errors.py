"""What went wrong with a server, as our errors."""

from __future__ import annotations

import re
from typing import Any

import httpx
import openai

from mara_integrations.errors import (
    ConfigError,
    ContextLengthError,
    HeadError,
    MaraError,
    ModelError,
    ServerError,
    in_one_line,
)

_OVERLOADED = "ask less at once, or raise max_retries"
_HINTS = {
    401: "give api_key=, or set MARA_API_KEY",
    403: "give an api_key that may do this",
    408: "raise timeout=, in seconds",
    429: _OVERLOADED,
    503: _OVERLOADED,
}


def as_our_error(error: Exception, url: str) -> MaraError:
    """Return the error of this package for one that the client raised.

    What is wrong with the request reads as it would in this process; all else is a `ServerError` that names the server.

    Args:
        error: What was raised.
        url: Address of the server.
    """
    if isinstance(error, MaraError):
        return error
    ours: MaraError
    # Older clients let the errors of httpx through while a stream is read.
    if isinstance(error, (openai.APITimeoutError, httpx.TimeoutException)):
        ours = ServerError(f"{url} did not answer in time", hint="raise timeout=, in seconds")
    elif isinstance(error, (openai.APIConnectionError, httpx.TransportError)):
        cause = in_one_line(error.__cause__ or error)
        ours = ServerError(f"the connection to {url} failed: {cause}", hint="is a server running there?")
    elif isinstance(error, openai.APIError):
        ours = _as_told(error, url)
    else:
        ours = ServerError(f"the answer of {url} can't be read: {in_one_line(error)}", hint="is it OpenAI's API?")
    ours.__cause__ = error
    return ours


def _as_told(error: openai.APIError, url: str) -> MaraError:
    """Return what the server itself said, by a status, or within a stream whose status was sent already."""
    body: dict[str, Any] = error.body if isinstance(error.body, dict) else {}
    told = body.get("code")  # where vLLM says the status of what it refuses within a stream
    status = error.status_code if isinstance(error, openai.APIStatusError) else told if isinstance(told, int) else None
    message, hint = _parted(str(body.get("message") or error.message))
    if error.code == "context_length_exceeded" or "maximum context length" in message:
        return ContextLengthError(message, hint=hint or "shorten the prompt, or lower max_tokens")
    if status in (400, 404, 422) or body.get("type") == "invalid_request_error":
        if error.param == "head" or re.match("(no )?head ", message):
            return HeadError(message, hint=hint)
        if status == 404 and "model" in message:
            return ModelError(message, hint=hint or "leave model out to take the server's own")
        if status != 404:
            return ConfigError(message, hint=hint)
    said = "failed while it answered" if status is None else f"answered with status {status}"
    if status == 404:
        hint = "base_url is the part before /chat/completions, as http://127.0.0.1:8000/v1"
    return ServerError(f"{url} {said}: {message}", hint=_HINTS.get(status or 0, hint))


def _parted(message: str) -> tuple[str, str | None]:
    """Return an error's message without the hint that `mara-tools serve` puts behind it, and the hint."""
    found = re.fullmatch(r"(.*) \(hint: (.*)\)", message, re.DOTALL)
    return (found[1], found[2]) if found else (message, None)
