"""The settings of a request: which ones a caller may give, and the one place that decides which value applies.

Knows no model and no prompt.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from mara_integrations.engine.gate import check_strength
from mara_integrations.engine.patterns.automaton import check_patterns
from mara_integrations.errors import ConfigError
from mara_integrations.heads.compose import Head, greedy_settings, trained_settings
from mara_integrations.heads.source import HeadSource
from mara_integrations.replies.forms import ReplyForm
from mara_integrations.sampling import Fallback, GateParams, SamplingParams, Selection


class DecodingSettings(TypedDict, total=False):
    """Fields of `SamplingParams` and `GateParams`; `max_tokens` is another name of `max_new_tokens`."""

    max_new_tokens: int | None
    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_candidates: int | None
    stop: str | Sequence[str] | None
    never: str | Sequence[str] | None
    seed: int | None
    strength: float | None
    selection: Selection | None
    fallback: Fallback | None
    trace: bool | None


class RequestSettings(DecodingSettings, total=False):
    """Everything that a call may set beside its prompt.

    `head` and `system_prompt`: see `MARAEngine`. `form`: tools and schemas, see `ReplyForm`. `raw`: a prompt that is a
    string is text to continue, not a user's message.
    """

    head: HeadSource | None
    system_prompt: str | None
    form: ReplyForm | None
    raw: bool


@dataclass(frozen=True, slots=True)
class ResolvedSettings:
    """The settings of one request after call, object and head were merged.

    Attributes:
        head: The head on the model's device; None for the base model.
        system_prompt: Text put before a conversation that brings no system message; None or empty for none.
        form: Form of the reply.
        raw: Whether a string is text to continue.
        sampling: Settings of the candidates and of the reply's end.
        gate: Settings of the gate.
    """

    head: Head | None
    system_prompt: str | None
    form: ReplyForm
    raw: bool
    sampling: SamplingParams
    gate: GateParams


# Names and values that code written for hosted models passes, and that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
}
_NAMES = (*RequestSettings.__annotations__,)
# None as the value of these is a choice (the base model, fresh random numbers); of others it means "not given".
_NULLABLE = ("head", "seed")


def overlay(call: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a call over those of the object that was called, under one name each.

    Words and patterns that must never appear add up: a call can't lift what the object forbids.

    Raises:
        ConfigError: If a name is unknown, or a setting of another engine has a value that would change something.
    """
    own, called = _given(defaults), _given(call)
    words = [*_words(own.get("never")), *_words(called.get("never"))]
    return {**own, **called, **({"never": words} if words else {})}


def resolve_settings(
    call: Mapping[str, Any], defaults: Mapping[str, Any], place: Callable[[HeadSource | None], Head | None]
) -> ResolvedSettings:
    """Merge the settings of one request: the call goes before the object, the object before the head.

    | setting                                      | call | object | head           | else                   |
    | -------------------------------------------- | ---- | ------ | -------------- | ---------------------- |
    | `head`                                       | yes  | yes    |                | the base model         |
    | `strength` at temperature 0                  | yes  | yes    | trained to     | `GateParams`           |
    | `strength`, `selection`, `fallback`, `trace` | yes  | yes    |                | `GateParams`           |
    | `temperature`, `max_new_tokens`              | yes  | yes    |                | `SamplingParams`       |
    | `stop`, `seed`                               | yes  | yes    |                | `SamplingParams`       |
    | `never`                                      | both | both   |                | `SamplingParams`       |
    | `top_k`, `top_p`, `min_candidates`           | yes  | yes    | trained with   | `SamplingParams`       |
    | `system_prompt`                              | yes  | yes    | trained with   | none; `""` says so too |
    | `form`, `raw`                                | yes  |        |                | any text; a message    |

    None means "not given", except for `head` (the base model) and `seed` (fresh random numbers). A head at strength 0
    sets nothing: `strength=0` and `head=None` are the same request. A request at temperature 0 that names no `strength`
    has at most the `top_p` that the head brings for those, whatever it names.

    Args:
        call: Settings of the call.
        defaults: Settings of the object that was called, which are its constructor's arguments.
        place: Turns what `head` names into a head on the model's device.

    Raises:
        ConfigError: If a setting is unknown or has a value that is not allowed, or if composed heads were trained with
            different settings and none is given.
        HeadError: If the head can't be read or does not fit the model.
    """
    given = overlay(call, defaults)
    source, form = given.pop("head", None), given.pop("form", None)
    gate, sampling = _checked(given)
    head = place(source)
    if head is not None:
        check_strength(head.config.form, gate)
        if gate.strength > 0:
            given = {**trained_settings(head, given), **given}
            gate, sampling = _checked(given)
            if sampling.temperature == 0 and "strength" not in given:
                gate, sampling = _checked({**given, **greedy_settings(head, sampling.top_p)})
    raw = given.get("raw", False)
    return ResolvedSettings(head, given.get("system_prompt"), form or ReplyForm(), raw, sampling, gate)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings that no request could run with.

    Raises:
        ConfigError: If a name is unknown, a value is out of bounds, or a pattern can't be kept out.
    """
    _checked(overlay({}, settings))


def _words(value: str | Sequence[str] | None) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value or ()


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that were given, under the engine's names."""
    given: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _NEUTRAL:
            if value is not None and value not in _NEUTRAL[name]:
                raise ConfigError(f"{name}={value!r} is not supported", hint=f"leave it out, or {_NEUTRAL[name][0]!r}")
        elif name not in _NAMES:
            raise unknown_setting(name, value, _NAMES)
        elif value is not None or name in _NULLABLE:
            given[name] = value
    short = given.pop("max_tokens", None)
    if short is not None and given.setdefault("max_new_tokens", short) != short:
        raise ConfigError(
            f"max_tokens={short!r} and max_new_tokens={given['max_new_tokens']!r} contradict each other",
            hint="they are two names of one setting: give one",
        )
    return given


def unknown_setting(name: str, value: Any, known: Sequence[str], owner: str = "") -> ConfigError:
    """Return the error for an unknown setting, with the nearest known name."""
    near = difflib.get_close_matches(name, known, n=1)
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."
    return ConfigError(
        f"{name}={shown} is not a setting{owner}",
        hint=f"did you mean {near[0]}?" if near else f"settings are {', '.join(sorted(known))}",
    )


def _checked(given: Mapping[str, Any]) -> tuple[GateParams, SamplingParams]:
    gate, sampling = (
        {name: given[name] for name in params.model_fields if name in given} for params in (GateParams, SamplingParams)
    )
    for name, kind in (("raw", bool), ("system_prompt", str)):
        if not isinstance(given.get(name, kind()), kind):
            raise ConfigError(f"{name}={given[name]!r} is not allowed: a {kind.__name__} is needed")
    checked = GateParams.of(**gate), SamplingParams.of(**sampling)
    check_patterns(checked[1].never)
    return checked
