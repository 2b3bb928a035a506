"""Opens the chat model that judges: by the notation of LangChain, one of ours, or an object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mara_integrations.errors import MissingExtraError, RewardError

if TYPE_CHECKING:
    from langchain_core.runnables import Runnable

LOCAL_PREFIX = "mara:"
# What a command line may pass on to the model, and its type. No keys: those come from the environment.
MODEL_ARGUMENTS: dict[str, type] = {
    "temperature": float,
    "max_tokens": int,
    "timeout": float,
    "max_retries": int,
    "base_url": str,
}


def open_model(name: str, arguments: Mapping[str, Any]) -> Runnable[Any, Any]:
    """Return the chat model of a name: `provider:model` as LangChain has it, or `mara:` and a model of ours.

    Raises:
        MissingExtraError: If LangChain, or its package for the provider, is not installed.
        RewardError: If there is no such model, or it can't be opened, as without a key.
    """
    if name.startswith(LOCAL_PREFIX):
        unknown = [argument for argument in arguments if argument not in ("temperature", "max_tokens")]
        if unknown:
            raise RewardError(f"judge {name!r}: a local model takes no {unknown[0]}", hint="temperature or max_tokens")
        ours = import_module("mara_integrations")  # its frameworks are above rewards, and start torch
        opened: Runnable[Any, Any] = ours.ChatMARA(name.removeprefix(LOCAL_PREFIX), **{"max_tokens": 256, **arguments})
        return opened
    try:
        chat_models = import_module("langchain.chat_models")
    except ImportError as error:
        raise MissingExtraError(
            f"judge {name!r} needs langchain", hint="pip install 'mara-integrations[judge]'"
        ) from error
    try:
        opened = chat_models.init_chat_model(name, **arguments)
    except ImportError as error:  # the package of the provider
        reason = " ".join(str(error).split())
        raise MissingExtraError(f"judge {name!r} can't be opened: {reason}") from error
    except Exception as error:  # a provider that is unknown, no key: each has errors of its own
        reason = str(error).strip().partition("\n")[0]
        raise RewardError(
            f"judge {name!r} can't be opened: {reason}",
            hint="name it as init_chat_model of LangChain does, such as openai:gpt-5-mini; keys are read from the "
            "environment",
        ) from error
    return opened


def as_chat_model(model: Any) -> Runnable[Any, Any]:
    """Return a given object as a chat model.

    Raises:
        RewardError: If it is none.
    """
    if hasattr(model, "as_langchain"):  # our MARALLM
        model = model.as_langchain()
    if not hasattr(model, "batch_as_completed"):
        raise RewardError(
            f"judge {model!r:.80} is a {type(model).__name__}",
            hint="give a chat model of LangChain, a MARALLM, or a name such as openai:gpt-5-mini",
        )
    chat_model: Runnable[Any, Any] = model
    return chat_model


def structured(model: Runnable[Any, Any], schema: Mapping[str, Any], name: str) -> Runnable[Any, Any]:
    """Return a model that answers in a JSON schema.

    Raises:
        RewardError: If it can't.
    """
    try:
        answering: Runnable[Any, Any] = model.with_structured_output(dict(schema))  # type: ignore[attr-defined]
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise RewardError(
            f"judge {name!r} can't be held to a structure: {error}", hint="leave structured out: answers are then read"
        ) from None
    return answering


def described(model: Runnable[Any, Any]) -> dict[str, Any]:
    """Return what an object tells of itself, as JSON values: its class, and what it calls identifying."""
    told = {"class": type(model).__qualname__, "params": getattr(model, "_identifying_params", {})}
    plain = json.dumps(told, sort_keys=True, default=lambda value: type(value).__qualname__)
    values: dict[str, Any] = json.loads(plain)
    return values


def shown_name(model: Runnable[Any, Any]) -> str:
    """Return a short name of an object for messages."""
    for attribute in ("model_name", "model", "model_id"):
        if isinstance(value := getattr(model, attribute, None), str) and value:
            return value
    return type(model).__name__


def answer_text(answer: Any) -> str:
    """Return an answer as text: a message's, or a structure as JSON."""
    if hasattr(answer, "content"):
        return str(answer.text)
    return answer if isinstance(answer, str) else json.dumps(answer, sort_keys=True, default=str)
