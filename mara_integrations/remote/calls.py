"""A request as its server takes it: settings and prompt as the body of OpenAI's API, and what each kind of server adds.

Templates and tokenizers are the server's, so messages and tools are sent, not tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from mara_integrations.engine.build_request import check_prompt, prepared
from mara_integrations.engine.settings import ResolvedSettings
from mara_integrations.errors import ConfigError
from mara_integrations.heads.source import HeadSource, head_weights
from mara_integrations.messages import Conversation, Message, Prompt
from mara_integrations.replies.forms import ReplyForm

# `ours` is `mara-tools serve`, `vllm` is `vllm serve` with our plug-in, `other` knows OpenAI's API and no heads.
ServerKind: TypeAlias = Literal["ours", "vllm", "other"]
# Ray Serve, which runs vLLM, names `organization-owner`. Whether there is a plug-in is asked before a head is sent.
_OWNERS: dict[str, ServerKind] = {"mara_integrations": "ours", "vllm": "vllm", "organization-owner": "vllm"}
_NAMES: dict[ServerKind, str] = {"ours": "mara-tools serve", "vllm": "vLLM", "other": "a server of this kind"}

# Settings beyond OpenAI's API: those of the gate say something only where there is a head.
_OF_THE_HEAD = ("head", "strength", "selection", "fallback")
_OF_CANDIDATES = ("top_k", "top_p", "min_candidates", "never")
_KNOWN: dict[ServerKind, tuple[str, ...]] = {
    "ours": (*_OF_THE_HEAD, *_OF_CANDIDATES),
    "vllm": ("head", "strength", "top_k", "top_p", "min_candidates"),
    "other": ("top_p",),
}


@dataclass(frozen=True, slots=True)
class ServerCall:
    """What one request asks of a server.

    Attributes:
        prompt: A conversation, with its system message; or text or token ids to continue.
        form: Form of the reply.
        settings: Settings that the call or the engine gives, by name.
        standard: Fields of OpenAI's API that do not depend on the kind of server.
    """

    prompt: Prompt
    form: ReplyForm
    settings: Mapping[str, Any]
    standard: Mapping[str, Any]

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is a conversation."""
        return isinstance(self.prompt, Conversation)

    @property
    def must_call(self) -> bool:
        """Whether the reply can be nothing but calls."""
        return bool(self.form.tools) and not self.form.is_free

    def body(self, model: str, kind: ServerKind) -> dict[str, Any]:
        """Return the arguments of the client's `create`.

        Raises:
            ConfigError: If a setting is given that servers of this kind do not have.
        """
        return {
            "model": model,
            **self.standard,
            "stream": True,
            "stream_options": {"include_usage": True},
            "extra_body": _extra_body(self.settings, kind),
        }


def kind_of(owner: str | None) -> ServerKind:
    """Return the kind of a server that says `owned_by` of its model."""
    return _OWNERS.get(owner or "", "other")


def check_head(source: HeadSource | None) -> None:
    """Refuse heads that are not names: a server knows its heads by name, and takes no weights or paths.

    Raises:
        ConfigError: Names the head.
    """
    for one in head_weights(source):
        if not isinstance(one, str):
            raise ConfigError(
                f"head={str(one)!r:.80} can't be sent to a server",
                hint="save it, serve it with `mara-tools serve --head NAME=FOLDER`, and give head=NAME",
            )
        if any(mark in one for mark in "/\\:="):
            name = one.replace("\\", "/").rstrip("/").split("/")[-1]
            raise ConfigError(
                f"head={one!r} is a folder or a Hub id, and a server knows heads by name",
                hint=f"serve it with `mara-tools serve --head {name}={one}`, and give head={name!r}",
            )


def make_call(
    prompt: Prompt, settings: ResolvedSettings, given: Mapping[str, Any], top_logprobs: int | None = None
) -> ServerCall:
    """Return the call of a prompt.

    Args:
        prompt: As `MARAEngine.generate` takes it.
        settings: Everything that holds, checked.
        given: What the call or the engine gives, by name; of the rest the server's own defaults hold.
        top_logprobs: Alternatives to report at each token; None reports no log-probabilities.

    Raises:
        ConfigError: If the prompt is empty, or something is asked for that needs the model in this process.
    """
    check_head(given.get("head"))
    if settings.gate.trace:
        raise ConfigError("trace=True: a server sends no traces", hint="run the model in this process, or ask logprobs")
    check_prompt(prompt)
    prompt = prepared(prompt, settings)
    standard: dict[str, Any] = {
        "temperature": settings.sampling.temperature,
        "max_tokens": settings.sampling.max_new_tokens,  # other servers have other defaults than 512, or none
    }
    if given.get("seed") is not None:
        standard["seed"] = given["seed"]
    if settings.sampling.stop:
        standard["stop"] = list(settings.sampling.stop)
    if isinstance(prompt, Conversation):
        standard |= {"messages": _messages(prompt), **_form(settings.form)}
        if top_logprobs is not None:
            standard |= {"logprobs": True, "top_logprobs": top_logprobs}
    elif settings.form != ReplyForm():
        raise ConfigError("tools and schemas need a conversation", hint="give messages, not raw text or token ids")
    else:
        standard["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
        if top_logprobs is not None:
            standard["logprobs"] = top_logprobs
    return ServerCall(prompt, settings.form, given, standard)


def _extra_body(given: Mapping[str, Any], kind: ServerKind) -> dict[str, Any]:
    """Return what servers of this kind take beyond OpenAI's API; the one place that knows how each of them is told.

    Raises:
        ConfigError: If a setting is given that they do not have.
    """
    has_head = given.get("head") is not None
    names = (*(_OF_THE_HEAD if has_head else ()), *_OF_CANDIDATES)
    wanted = {name: given[name] for name in names if given.get(name) is not None}
    for name, value in wanted.items():
        if name not in _KNOWN[kind]:
            raise ConfigError(
                f"{name}={value!r} is nothing that {_NAMES[kind]} takes",
                hint="leave it out, or run the model in this process or by `mara-tools serve`",
            )
    weights = {str(one): weight for one, weight in head_weights(wanted.pop("head", None)).items()}
    if kind == "vllm" and has_head:  # vllm_xargs holds no objects
        of_head = {"head": list(weights), "weights": list(weights.values()), **wanted}
        return {"vllm_xargs": {f"mara_{name}": value for name, value in of_head.items()}}
    if kind == "vllm" and "min_candidates" in wanted:
        raise ConfigError("min_candidates is for heads, and there is none", hint="leave it out")
    if has_head:
        wanted["head"] = weights
    if kind == "ours" and given.get("system_prompt") == "":
        wanted["system_prompt"] = ""  # else the server's or the head's own would be put in
    return wanted


def _form(form: ReplyForm) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if form.tools:
        fields["tools"] = [tool.as_dict() for tool in form.tools]
        named = {"type": "function", "function": {"name": form.tool_choice}}
        fields["tool_choice"] = {"auto": "auto", "none": "none", "any": "required"}.get(form.tool_choice, named)
        if form.parallel is not None or form.tool_choice != "auto":
            fields["parallel_tool_calls"] = bool(form.parallel)
    if form.json_schema is not None:
        schema = {"name": "answer", "strict": True, "schema": dict(form.json_schema)}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def _messages(prompt: Conversation) -> list[dict[str, Any]]:
    if prompt.tools:
        raise ConfigError("a Conversation with tools of its own is not sent to a server", hint="give them as tools=")
    return [_message(message) for message in prompt.messages]


def _message(message: Message) -> dict[str, Any]:
    return {name: value for name, value in message.as_dict(arguments_as_text=True).items() if value is not None}
