"""From the body of a request to a call of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from mara_integrations.messages import Message, Prompt, ToolCall
from mara_integrations.replies.forms import ReplyForm
from mara_integrations.server.bodies import ENGINE_FIELDS, ChatBody, ChatMessage, CompletionBody, ToolChoice, checked
from mara_integrations.server.errors import RefusalError, shown
from mara_integrations.server.names import ServedNames

_Form = ("tools", "tool_choice", "parallel_tool_calls", "response_format")


@dataclass(frozen=True, slots=True)
class EngineCall:
    """A checked request, as arguments for the engine.

    Attributes:
        model: The model as the client named it.
        prompts: At least one prompt; exactly one in a chat or a stream.
        settings: Keyword arguments of `MARAEngine.generate`.
        is_stream: Whether to answer token by token.
        has_usage: Whether a stream ends with the counts of tokens.
        top_logprobs: Alternatives to report at each token; None reports no log-probabilities.
        ignored: Names of unknown fields.
    """

    model: str
    prompts: tuple[Prompt, ...]
    settings: dict[str, Any]
    is_stream: bool
    has_usage: bool
    top_logprobs: int | None
    ignored: tuple[str, ...] = ()


def read_json(body: bytes) -> dict[str, Any]:
    """Parse a body. Its depth is bounded; lone surrogates and NaN are not JSON.

    Raises:
        RefusalError: If it is not a JSON object.
    """
    try:
        parsed = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RefusalError(400, f"the body is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise RefusalError(400, f"the body is not a JSON object but {shown(parsed)}")
    return parsed


def read_chat(body: Mapping[str, Any], names: ServedNames) -> EngineCall:
    """Check the body of a chat.

    Args:
        body: The parsed JSON.
        names: The model and the heads that requests may name.

    Raises:
        RefusalError: Status 400 if a field is missing or has a value that is not allowed, 404 if the model or a head is
            not served.
    """
    fields: Any = checked(ChatBody, body)
    settings = _settings(fields, names)
    if fields.max_completion_tokens is not None:
        settings["max_new_tokens"] = fields.max_completion_tokens
    if fields.system_prompt is not None:
        settings["system_prompt"] = fields.system_prompt
    if fields.response_format is not None and fields.response_format.type == "json_schema":
        _require("response_format.json_schema", fields.response_format.json_schema)
    if fields.top_logprobs is not None and not fields.logprobs:
        problem = f"top_logprobs={fields.top_logprobs} needs logprobs=true"
        raise RefusalError(400, problem, param="top_logprobs")
    _check_tool_choice(fields)
    settings["form"] = ReplyForm.of_call({name: body[name] for name in _Form if body.get(name) is not None})
    prompt = tuple(_message(f"messages[{index}]", message) for index, message in enumerate(fields.messages))
    return _call(fields, names, (prompt,), settings, (fields.top_logprobs or 0) if fields.logprobs else None)


def read_completion(body: Mapping[str, Any], names: ServedNames) -> EngineCall:
    """Check the body of a completion; see `read_chat`."""
    fields: Any = checked(CompletionBody, body)
    prompt = fields.prompt
    if isinstance(prompt, str):
        prompts: tuple[Prompt, ...] = (prompt,)
    elif isinstance(prompt[0], int):
        prompts = (tuple(prompt),)
    else:
        prompts = tuple(one if isinstance(one, str) else tuple(one) for one in prompt)
    if fields.stream and len(prompts) > 1:
        raise RefusalError(400, "a stream has one prompt (hint: send a request for each)", param="prompt")
    settings = {**_settings(fields, names), "raw": True}
    return _call(fields, names, prompts, settings, fields.logprobs)


def _call(
    fields: Any, names: ServedNames, prompts: tuple[Prompt, ...], settings: dict[str, Any], top_logprobs: int | None
) -> EngineCall:
    has_usage = fields.stream_options is not None and bool(fields.stream_options.include_usage)
    return EngineCall(
        model=fields.model or names.model,
        prompts=prompts,
        settings=settings,
        is_stream=bool(fields.stream),
        has_usage=has_usage,
        top_logprobs=top_logprobs,
        ignored=tuple(fields.model_extra),
    )


def _settings(fields: Any, names: ServedNames) -> dict[str, Any]:
    settings = {name: getattr(fields, name) for name in (*ENGINE_FIELDS, "stop", "never")}
    settings = {name: value for name, value in settings.items() if value is not None}
    if fields.max_tokens is not None:
        settings["max_new_tokens"] = fields.max_tokens
    settings["head"] = _head(fields, names)
    return settings


def _head(fields: Any, names: ServedNames) -> dict[Any, float] | None:
    """Return the heads that `head` names, else the one that `model` names; None is the base model."""
    name = fields.model or names.model
    of_model = name.removeprefix(f"{names.model}:")  # the model's own name may hold colons
    if name != names.model and (of_model == name or not of_model):
        raise unknown_model(name, names)
    wanted = fields.head if fields.head is not None else (of_model if name != names.model else None)
    if wanted is None:
        return None
    given = [wanted] if isinstance(wanted, str) else wanted
    weights: dict[str, float] = given if isinstance(given, dict) else {one: float(given.count(one)) for one in given}
    placed: dict[Any, float] = {}
    for one, weight in weights.items():
        if one not in names.heads:
            message = f"head {shown(one)} is not served (hint: heads are {', '.join(names.heads) or 'none'})"
            raise RefusalError(404, message, code="model_not_found", param="model" if fields.head is None else "head")
        source = names.heads[one]
        placed[source] = placed.get(source, 0.0) + weight
    return placed


def unknown_model(name: str, names: ServedNames) -> RefusalError:
    """Return the answer to a request for a model that is not served."""
    message = f"model {shown(name)} is not served (hint: models are {', '.join(names.all)})"
    return RefusalError(404, message, code="model_not_found", param="model")


def _message(name: str, message: ChatMessage) -> Message:
    role: Any = "system" if message.role == "developer" else message.role  # OpenAI's newer name
    if role in ("system", "user"):
        _require(f"{name}.content", message.content)
    if message.tool_calls and role != "assistant":
        problem = f"{name} of the {role} has tool calls; only the assistant calls tools"
        raise RefusalError(400, problem, param=f"{name}.tool_calls")
    content = message.content or ""
    return Message(
        role,
        content if isinstance(content, str) else "\n".join(part.text for part in content),
        tuple(
            ToolCall(
                call.id or f"call_{index}",
                call.function.name,
                _arguments(f"{name}.tool_calls[{index}].function.arguments", call.function.arguments),
            )
            for index, call in enumerate(message.tool_calls or ())
        ),
        message.tool_call_id,
        message.name if role == "tool" else None,
    )


def _check_tool_choice(fields: Any) -> None:
    """Refuse a choice of a tool that is not there; `ReplyForm` would answer in words that this API does not have."""
    choice, names = fields.tool_choice, [tool.function.name for tool in fields.tools or ()]
    there_are = f"tools are {', '.join(names)}" if names else "the request has no tools"
    if choice == "required" and not names:
        raise RefusalError(400, "tool_choice='required' needs tools (hint: send tools)", param="tool_choice")
    if isinstance(choice, ToolChoice) and choice.function.name not in names:
        problem = f"tool_choice names {shown(choice.function.name)}, which is not a tool (hint: {there_are})"
        raise RefusalError(400, problem, param="tool_choice.function.name")


def _arguments(name: str, value: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    try:
        parsed = from_json(value or "{}", allow_inf_nan=False)
    except ValueError as error:
        raise RefusalError(400, f"{name}={shown(value)} is not JSON: {error}", param=name) from None
    if not isinstance(parsed, dict):
        raise RefusalError(400, f"{name}={shown(value)} is not a JSON object", param=name)
    return parsed


def _require(name: str, value: object) -> None:
    if value is None:
        raise RefusalError(400, f"{name!r} is missing", param=name)
