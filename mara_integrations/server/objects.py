"""The objects of OpenAI's API that the server answers with; `/openapi.json` shows the same declarations."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

FinishReason = Literal["stop", "length", "tool_calls"]


class Usage(TypedDict):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class FunctionOfCall(TypedDict):
    """The function that a call names; its arguments are a JSON object as text."""

    name: NotRequired[str]
    arguments: str


class CallOfReply(TypedDict):
    """A call that the model made; in a stream `index` tells which call a part belongs to."""

    index: NotRequired[int]
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionOfCall


class ReplyMessage(TypedDict):
    """The message of a reply, or a part of it in a stream."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[CallOfReply]]


class ChatChoice(TypedDict):
    """A reply."""

    index: int
    message: ReplyMessage
    finish_reason: FinishReason
    logprobs: dict[str, Any] | None


class ChatChunkChoice(TypedDict):
    """A part of a reply; log-probabilities come with the last."""

    index: int
    delta: ReplyMessage
    finish_reason: FinishReason | None
    logprobs: NotRequired[dict[str, Any] | None]


class CompletionChoice(TypedDict):
    """A reply to a prompt, or a part of it in a stream."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: dict[str, Any] | None


class ChatCompletion(TypedDict):
    """The answer to a chat. `gate` counts what the gate accepted, rejected and so on."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    gate: dict[str, int]


class ChatCompletionChunk(TypedDict):
    """A part of a streamed answer to a chat. `gate` comes with the counts of tokens."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage]
    gate: NotRequired[dict[str, int]]


class Completion(TypedDict):
    """The answer to a completion, or a part of it in a stream. `gate` has an object for each of several prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage]
    gate: NotRequired[dict[str, int] | list[dict[str, int]]]


class ModelObject(TypedDict):
    """A model that requests may name: the base model, or it with a head.

    `max_model_len` is its context window in tokens, once it is loaded; vLLM's name for it.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: NotRequired[int]


class ModelList(TypedDict):
    """All models that requests may name."""

    object: Literal["list"]
    data: list[ModelObject]


class Health(TypedDict):
    """Whether the server can answer; with status 503 it can't."""

    status: Literal["ok", "failed"]
    is_loaded: bool


class ErrorDetail(TypedDict):
    """The error of a request."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(TypedDict):
    """The answer to a request that failed."""

    error: ErrorDetail
