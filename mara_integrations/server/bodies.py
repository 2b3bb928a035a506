"""The bodies of requests: the fields that clients may send, and what is answered where one is wrong.

Each field is declared once, here or in `SamplingParams` and `GateParams`; `/openapi.json` shows the same declarations.

Source: OpenAI's API, "Create chat completion" and "Create completion".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from mara_integrations.sampling import (
    MAX_NEVER,
    MAX_NEVER_CHARS,
    MAX_STOP_CHARS,
    MAX_STOPS,
    GateParams,
    Params,
    SamplingParams,
)
from mara_integrations.server.errors import RefusalError, shown

MAX_MESSAGES = 4096
MAX_TOOLS = 128  # as OpenAI
MAX_LOGPROBS = 20  # as OpenAI

_Name: TypeAlias = Annotated[str, Field(pattern=r"^[\w.:/-]{1,128}$")]
_MaxTokens: Any = Annotated[(int, *SamplingParams.model_fields["max_new_tokens"].metadata)]
_Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_Never: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_NEVER_CHARS)]
_Weight: TypeAlias = Annotated[float, Field(ge=0, le=1000)]
_TokenIds: TypeAlias = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True, min_length=1)]


class _Part(BaseModel):
    """A part of a body; fields it does not know are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(_Part):
    """A part of a content that is given in parts; images and audio are not supported."""

    type: Literal["text"]
    text: str


class CalledFunction(_Part):
    """The function that a call names, and its arguments."""

    name: _Name
    arguments: str | dict[str, Any] = Field("", description="A JSON object, usually as text.")


class CallInMessage(_Part):
    """A call that the assistant made earlier."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessage(_Part):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: Annotated[list[CallInMessage], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class Function(_Part):
    """A function that the model may call."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments.")


class ToolOfRequest(_Part):
    """A tool; only functions are supported."""

    type: Literal["function"] = "function"
    function: Function


class ChosenFunction(_Part):
    """The name of a function."""

    name: str


class ToolChoice(_Part):
    """The one tool that the model must call."""

    type: Literal["function"] = "function"
    function: ChosenFunction


class JSONSchema(_Part):
    """A schema that the reply must follow."""

    name: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")


class ResponseFormat(_Part):
    """The form of the reply."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = Field(None, description="Required by the type json_schema.")


class StreamOptions(_Part):
    """Options of a stream."""

    include_usage: bool | None = Field(None, description="End the stream with a chunk that counts the tokens.")


def _optional(params: type[Params], *names: str) -> dict[str, Any]:
    """Return fields of engine settings for `create_model`, each None unless given."""
    fields: dict[str, Any] = {}
    for name in names:
        declared = params.model_fields[name]
        bounded: Any = Annotated[(declared.annotation, Field(), *declared.metadata)]
        fields[name] = (bounded | None, Field(None, description=declared.description))
    return fields


ENGINE_FIELDS = {
    **_optional(SamplingParams, "temperature", "top_k", "top_p", "min_candidates", "seed"),
    **_optional(GateParams, "strength", "selection", "fallback"),
}


class _GenerationBody(BaseModel):
    """The fields that chats and completions share. Unknown fields are kept, so that the log can name them."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = Field(
        None, description="The base model, or base:head; `GET /v1/models` lists them. Default: the base model."
    )
    head: str | Annotated[list[str], Field(min_length=1, max_length=64)] | dict[str, _Weight] | None = Field(
        None, description="A head, several, or several with weights; goes before the one that `model` names."
    )
    max_tokens: _MaxTokens | None = Field(None, description="Upper bound of the reply, in tokens.")
    stop: _Stop | Annotated[list[_Stop], Field(fail_fast=True, max_length=MAX_STOPS)] | None = Field(
        None, description="Strings that end the reply; they are not part of it."
    )
    never: _Never | Annotated[list[_Never], Field(fail_fast=True, max_length=MAX_NEVER)] | None = Field(
        None,
        description="Words and phrases that the reply must not have, whole words in any case, and patterns: "
        "`re:` and a regular expression, or `rule:` and a name; beside those of the server.",
    )
    stream: bool | None = Field(None, description="Answer token by token, as server-sent events.")
    stream_options: StreamOptions | None = None
    # Values without effect are accepted, because clients send them; others are refused.
    n: Literal[1] | None = Field(None, description="Only 1 is supported.")
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(None, description="Only 0 is supported.")
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(None, description="Only 0 is supported.")
    repetition_penalty: Annotated[float, Field(ge=1, le=1)] | None = Field(None, description="Only 1 is supported.")
    min_p: Annotated[float, Field(ge=0, le=0)] | None = Field(None, description="Only 0 is supported.")
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = Field(
        None, description="Only an empty object is supported."
    )
    # Fields without any effect on a reply here.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


class _ChatBody(_GenerationBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: _MaxTokens | None = Field(None, description="The newer name of `max_tokens`; goes first.")
    logprobs: bool | None = Field(None, description="Report the log-probability of each token.")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description="Alternatives to report at each token; needs `logprobs`."
    )
    tools: Annotated[list[ToolOfRequest], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="Allow several calls in one reply.")
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="Not supported; use `tools`.")
    system_prompt: str | None = Field(
        None,
        description="Text put before a conversation without a system message, in place of the server's or the head's; "
        "an empty text puts none there.",
    )
    reasoning_effort: Any = Field(None, description="Without effect.")
    verbosity: Any = Field(None, description="Without effect.")


class _CompletionBody(_GenerationBody):
    prompt: str | _TokenIds | Annotated[list[str | _TokenIds], Field(fail_fast=True, min_length=1)] = Field(
        description="A text, or token ids; a list of either has a choice for each."
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description="Report the log-probability of each token, and this many alternatives."
    )
    best_of: Literal[1] | None = Field(None, description="Only 1 is supported.")
    echo: Literal[False] | None = Field(None, description="Only false is supported.")
    suffix: Literal[""] | None = Field(None, description="Only an empty text is supported.")


ChatBody = create_model(
    "ChatRequest", __base__=_ChatBody, __doc__="Body of `POST /v1/chat/completions`.", **ENGINE_FIELDS
)
CompletionBody = create_model(
    "CompletionRequest", __base__=_CompletionBody, __doc__="Body of `POST /v1/completions`.", **ENGINE_FIELDS
)


# --- pydantic's errors in words ---

# Fields of OpenAI's API that are supported only with the value that has no effect.
_UNSUPPORTED = {
    *("n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_p", "logit_bias"),
    *("echo", "suffix", "modalities", "functions"),
}
_PLAIN = {"Input should": "it should", " after validation": ""}
_Body = TypeVar("_Body", bound=BaseModel)


def checked(kind: type[_Body], body: Mapping[str, Any]) -> _Body:
    """Check a body against its declaration.

    Raises:
        RefusalError: Status 400; names the field, its value and what is allowed.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        found = [(_path(one["loc"], body, one["type"] == "missing"), one) for one in error.errors(include_url=False)]
    deepest = max(len(path) for path, _ in found)  # of a union, the branch that the value was meant for
    path, first = next((path, one) for path, one in found if len(path) == deepest)
    name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
    if first["type"] == "missing":
        raise RefusalError(400, f"{name!r} is missing", param=name)
    if path[0] in _UNSUPPORTED:
        raise RefusalError(400, f"{name}={shown(first['input'])} is not supported (hint: leave it out)", param=name)
    reasons = dict.fromkeys(_in_words(one["msg"]) for other, one in found if other == path)
    raise RefusalError(400, f"{name}={shown(first['input'])} is not allowed: {', or '.join(reasons)}", param=name)


def _in_words(message: str) -> str:
    for technical, plain in _PLAIN.items():
        message = message.replace(technical, plain)
    return f"{message[0].lower()}{message[1:]}"


def _path(location: tuple[int | str, ...], body: Any, is_missing: bool) -> tuple[int | str, ...]:
    """Return the steps of pydantic's location that lie in the body; the others name branches of a union."""
    path: list[int | str] = []
    value = body
    for step in location:
        is_key = isinstance(step, str) and isinstance(value, Mapping) and step in value
        is_index = isinstance(step, int) and isinstance(value, list) and step < len(value)
        if is_key or is_index:
            value = value[step]
            path.append(step)
    return (*path, location[-1]) if is_missing else tuple(path)
