"""What a request's body says, checked: its prompt, and the settings that the engine gets.

Source: OpenAI's API, "Create chat completion" and "Create completion".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mara_integrations.data.conversations import messages_of
from mara_integrations.data.records import BadRowError
from mara_integrations.errors import ConfigError
from mara_integrations.messages import Prompt
from mara_integrations.replies.forms import ReplyForm
from mara_integrations.sampling import GateParams, SamplingParams

# Said by clients, and without effect on a reply here.
_WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Allowed with these values alone: what they ask for beyond is not offered.
_FIXED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "echo": (None, False),
    "suffix": (None, ""),
    "modalities": (None, ["text"]),
}
_FORM = ("tools", "tool_choice", "parallel_tool_calls", "response_format")
_SETTINGS = {*SamplingParams.model_fields, *GateParams.model_fields} - {"max_new_tokens", "trace"}
_OTHERS = {"model", "head", "stream", "stream_options", "logprobs", "max_tokens"}
_OF_CHATS = {"messages", "top_logprobs", "max_completion_tokens", *_FORM}
_OF_COMPLETIONS = {"prompt"}
_MOST_LOGPROBS = 20


class UnknownModelError(ConfigError):
    """A request names a model or a head that is not served."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request.

    Attributes:
        model: As the client named it.
        prompts: At least one; of a chat, one.
        settings: For `MARAEngine.generate`.
        is_stream: Whether to answer token by token.
        has_usage: Whether a stream ends with the counts of tokens.
        top_logprobs: Alternatives to report at each token; None reports no log-probabilities.
    """

    model: str
    prompts: tuple[Prompt, ...]
    settings: dict[str, Any]
    is_stream: bool
    has_usage: bool
    top_logprobs: int | None


def read_request(body: Any, model: str, heads: Mapping[str, Any], *, is_chat: bool) -> Asked:
    """Check a body.

    Args:
        body: The parsed JSON.
        model: Name of the base model.
        heads: Heads by name; of `model: "base:name"`, and of the field `head`: a name, or several with weights.
        is_chat: Whether it is a chat, else a completion.

    Raises:
        ConfigError: If a field is missing, unknown, or has a value that is not allowed.
        UnknownModelError: If the model or a head is not served.
    """
    if not isinstance(body, dict):
        raise ConfigError("the body is no JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    known = _SETTINGS | _OTHERS | _WITHOUT_EFFECT | _FIXED.keys() | (_OF_CHATS if is_chat else _OF_COMPLETIONS)
    for name in given:
        if name not in known:
            raise ConfigError(f"{name!r} is no field of this request", hint=f"fields are {', '.join(sorted(known))}")
    for name, allowed in _FIXED.items():
        if given.get(name) not in allowed:
            raise ConfigError(f"{name}={given[name]!r} is not offered", hint="leave it out")
    settings = {name: given[name] for name in _SETTINGS if name in given}
    most = given.get("max_completion_tokens", given.get("max_tokens"))
    if most is not None:
        settings["max_new_tokens"] = most
    settings["head"] = _head(given, model, heads)
    top_logprobs = _top_logprobs(given, is_chat)
    if top_logprobs is not None:
        settings["trace"] = True  # the log-probabilities are read from it
    if is_chat:
        settings["form"] = _form(given)
    prompts = (_messages(given),) if is_chat else _texts(given)
    is_stream, options = given.get("stream", False), given.get("stream_options") or {}
    if not isinstance(is_stream, bool) or not isinstance(options, dict):
        raise ConfigError("stream is true or false, and stream_options an object")
    if is_stream and len(prompts) > 1:
        raise ConfigError("a stream has one prompt", hint="send a request for each")
    name = str(given.get("model") or model)
    return Asked(name, prompts, settings, is_stream, bool(options.get("include_usage")), top_logprobs)


def _head(given: Mapping[str, Any], model: str, heads: Mapping[str, Any]) -> Any:
    """The head that a request names by its model, or by its own field, which goes first; None is the base model."""
    name = str(given.get("model") or model)
    of_model = name.removeprefix(f"{model}:")  # the model's own name may hold colons
    if name != model and (of_model == name or not of_model):
        served = [model, *(f"{model}:{head}" for head in heads)]
        raise UnknownModelError(f"model {name!r} is not served", hint=f"models are {', '.join(served)}")
    wanted = given.get("head", of_model if name != model else None)
    if wanted is None:
        return None
    names = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(names, list | dict) or not all(isinstance(one, str) for one in names):
        raise ConfigError(f"head={wanted!r} is not allowed", hint="a name, a list of names, or names with weights")
    weights = names if isinstance(names, dict) else dict.fromkeys(names, 1.0)
    for one in weights:
        if one not in heads:
            raise UnknownModelError(f"head {one!r} is not served", hint=f"heads are {', '.join(heads) or 'none'}")
    return {heads[one]: weight for one, weight in weights.items()}


def _messages(given: Mapping[str, Any]) -> Prompt:
    if "messages" not in given:
        raise ConfigError("'messages' is missing", hint="a list of messages, each with a role and a content")
    try:
        return messages_of("messages", given["messages"])
    except BadRowError as error:
        raise ConfigError(str(error), hint=error.hint) from None


def _texts(given: Mapping[str, Any]) -> tuple[Prompt, ...]:
    """One prompt, or several: each a text or token ids."""
    prompt = given.get("prompt")
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, int) and not isinstance(item, bool) for item in prompt):
            return (tuple(prompt),)
        if all(isinstance(item, str | list) for item in prompt):
            return tuple(item if isinstance(item, str) else tuple(item) for item in prompt)
    raise ConfigError(
        "'prompt' is missing" if prompt is None else "'prompt' has another form",
        hint="a string, a list of token ids, or a list of either",
    )


def _form(given: Mapping[str, Any]) -> ReplyForm:
    try:
        return ReplyForm.of_call({name: given[name] for name in _FORM if name in given})
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"tools or response_format have another form than OpenAI's: {error}") from None


def _top_logprobs(given: Mapping[str, Any], is_chat: bool) -> int | None:
    wanted = given.get("logprobs")
    if is_chat:
        if wanted not in (None, True, False):
            raise ConfigError(f"logprobs={wanted!r} is not allowed", hint="true or false; top_logprobs is the number")
        wanted = given.get("top_logprobs", 0) if wanted else None
    if wanted is None:
        return None
    if not isinstance(wanted, int) or not 0 <= wanted <= _MOST_LOGPROBS:
        raise ConfigError(f"{wanted!r} log-probabilities are not allowed", hint=f"0 to {_MOST_LOGPROBS}")
    return int(wanted)
