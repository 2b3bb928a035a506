"""Rewards: what a reply is worth, as a Python function with TRL's signature or as a rule that marks offending text.

Calls them once a batch and checks what comes back, so that a reward's mistake is one clear line. Knows nothing of
tokens, models or training.
"""

from __future__ import annotations

import asyncio
import difflib
import importlib
import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from mara_integrations.errors import ConfigError, RewardError
from mara_integrations.messages import Message


class Reward(Protocol):
    """Any callable with TRL's signature, `(prompts, completions, completion_ids, **columns) -> list[float | None]`.

    It is called with keywords and gets those that it names, or all if it takes `**kwargs`. Prompts and completions are
    strings where the data's prompts are, else lists of `{"role", "content"}` messages. None means "no opinion". A
    coroutine function is awaited.

    Source: TRL, GRPOTrainer, "Using a custom reward function".
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Judge a batch."""


class Rule(Protocol):
    """Something that finds the places in a text that break it; training labels tokens by them."""

    def violations(self, text: str) -> list[tuple[int, int]]:
        """The (start, end) character spans that break the rule, sorted; empty for a text that complies."""


class ForbiddenWords:
    """The rule that words or phrases must not appear; as a reward 1.0 for a reply that complies, else 0.0.

    Only whole words count, in any case: a word ends where letters and digits do, so forbidding "you" also finds
    "you're" and Markdown's "_you_", but not "young". White space in a phrase matches any run of white space, a straight
    apostrophe the curly one too.

    Args:
        words: The words or phrases, at least one.

    Raises:
        ConfigError: If there is no word or one is blank.
    """

    def __init__(self, words: str | Iterable[str]) -> None:
        given = [words] if isinstance(words, str) else list(words)
        self.words = tuple(dict.fromkeys(" ".join(word.split()).casefold() for word in given))
        if not self.words or "" in self.words:
            raise ConfigError(
                f"forbidden words {given!r} are not allowed", hint="give at least one, none of them blank"
            )
        shown = [*self.words[:3], *(["…"] if len(self.words) > 3 else [])]
        self.__name__ = f"without {', '.join(shown)}"
        self._patterns = [re.compile(_whole_word(word), re.IGNORECASE) for word in self.words]

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float | None]:
        """1.0 for each completion that complies, 0.0 for each other; see `Reward`."""
        texts = (item if isinstance(item, str) else item[-1]["content"] for item in completions)
        return [0.0 if self.violations(text) else 1.0 for text in texts]

    def violations(self, text: str) -> list[tuple[int, int]]:
        """The spans of all forbidden words, sorted; those of a phrase and of a word within it overlap."""
        return sorted({match.span() for pattern in self._patterns for match in pattern.finditer(text)})

    def first_violation_end(self, text: str) -> int | None:
        """Where the first violation is complete, in characters; None for a text that complies."""
        return min((end for _, end in self.violations(text)), default=None)

    def spec(self) -> dict[str, Any]:
        """What `reward_from_spec` builds an equal rule from, as JSON can hold it."""
        return {"kind": "forbidden_words", "words": list(self.words)}

    def __repr__(self) -> str:
        return f"ForbiddenWords({list(self.words)!r})"


def _whole_word(word: str) -> str:
    # Not \b: it takes "_" for a letter, and finds no edge beside a word such as "c++".
    before = r"(?<![^\W_])" if word[0].isalnum() else ""
    after = r"(?![^\W_])" if word[-1].isalnum() else ""
    inner = r"\s+".join(re.escape(part) for part in word.split())
    return before + inner.replace("'", "['\u2019]") + after


class FunctionReward:
    """A user's reward function under the name it was loaded by, which a head's config keeps.

    Args:
        path: What `load_reward` was given.
        function: What it found there.
    """

    def __init__(self, path: str, function: Callable[..., Any]) -> None:
        self.path = path
        self.__wrapped__ = function  # inspect.signature follows it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function says."""
        return self.__wrapped__(*args, **kwargs)

    def spec(self) -> dict[str, Any]:
        """What `reward_from_spec` loads the same function from, as JSON can hold it."""
        return {"kind": "function", "path": self.path}

    def __repr__(self) -> str:
        return f"load_reward({self.path!r})"


def load_reward(path: str) -> FunctionReward:
    """Import a reward function: `package.module:function` or `folder/rewards.py:function`.

    The current folder, and a file's own folder, become importable and stay so, since a function may import late.

    Raises:
        RewardError: If the path has no such form, the module is absent or fails, or the attribute is absent or no
            function.
    """
    place, _, name = path.rpartition(":")
    if not place or not name.isidentifier():
        raise RewardError(
            f"reward {path!r} is not of the form module:function",
            hint="for example rewards.py:brand or my_package.rewards:brand",
        )
    module = _import_file(path, Path(place)) if place.endswith(".py") else _import_module(path, place)
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(name, functions) or functions[:5]
        raise RewardError(
            f"reward {path!r}: {place} has no {name!r}",
            hint=f"it has {', '.join(near)}" if near else "it has no function at all",
        )
    function = getattr(module, name)
    if isinstance(function, type) or not callable(function):
        what = "a class" if isinstance(function, type) else f"a {type(function).__name__}"
        raise RewardError(f"reward {path!r} is {what}, not a function", hint="name a function or a callable object")
    return FunctionReward(path, function)


def reward_name(reward: Reward) -> str:
    """What to call a reward in messages, metrics and charts."""
    if isinstance(reward, FunctionReward):
        return reward.path.rpartition(":")[2]
    return getattr(reward, "__name__", None) or type(reward).__name__


def reward_spec(reward: Reward) -> dict[str, Any]:
    """A reward's own `spec()`, or the dotted path of a plain function; `head_config.json` keeps it."""
    if hasattr(reward, "spec"):
        spec: dict[str, Any] = reward.spec()
        return spec
    owner = reward if hasattr(reward, "__qualname__") else type(reward)
    return {"kind": "function", "path": f"{owner.__module__}:{owner.__qualname__}"}


def reward_from_spec(spec: Mapping[str, Any]) -> Reward:
    """Build the reward that `reward_spec` described.

    Raises:
        RewardError: If the description is of no known kind or lacks a field; else as `ForbiddenWords`, `load_reward`.
    """
    try:
        match spec["kind"]:
            case "forbidden_words":
                return ForbiddenWords(spec["words"])
            case "function":
                return load_reward(spec["path"])
    except KeyError as error:
        raise RewardError(f"reward description {dict(spec)!r} lacks {error}") from None
    raise RewardError(f"reward kind {spec['kind']!r} is unknown", hint="kinds are forbidden_words, function")


def score(
    reward: Reward,
    prompts: Sequence[Sequence[Message]],
    completions: Sequence[str],
    *,
    completion_ids: Sequence[Sequence[int]] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    conversational: bool = False,
) -> list[float | None]:
    """Judge a batch with one call, and check what comes back.

    Args:
        reward: The function.
        prompts: One conversation a reply.
        completions: The replies' texts.
        completion_ids: The replies' token ids, for functions that take them.
        columns: The prompts' other fields, one value a reply, for functions that take them.
        conversational: Give prompts and completions as lists of messages; else as strings, and then each prompt must
            be one user message.

    Returns:
        One finite number a reply, or None where the reward has no opinion.

    Raises:
        RewardError: If the reward wants what the data lacks, raises, or returns anything but one finite number or
            None a reply.
    """
    if not completions:
        return []
    name = reward_name(reward)
    offered: dict[str, Any] = {
        **(columns or {}),
        "prompts": [_as_trl(prompt, conversational) for prompt in prompts],
        "completions": [_as_trl([Message("assistant", text)], conversational) for text in completions],
    }
    if completion_ids is not None:
        offered["completion_ids"] = [list(ids) for ids in completion_ids]
    arguments = _accepted(reward, name, offered)
    try:
        result = reward(**arguments)
        if inspect.isawaitable(result):
            result = asyncio.run(_awaited(result))
    except Exception as error:
        first = f"prompt {_short(prompts[0][-1].content)}, reply {_short(completions[0])}"
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise RewardError(
            f"reward {name!r} raised {type(error).__name__}: {error} (batch of {len(completions)}; first: {first})",
            hint=f"it happened at {frame.filename}:{frame.lineno}",
        ) from error
    return _checked(result, name, completions)


def _as_trl(messages: Sequence[Message], conversational: bool) -> Any:
    if conversational:
        return [{"role": message.role, "content": message.content} for message in messages]
    assert len(messages) == 1, "a standard prompt is one message"
    return messages[0].content


def _accepted(reward: Reward, name: str, offered: dict[str, Any]) -> dict[str, Any]:
    """Of what is offered, what the reward names."""
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # some callables of C have none
        return offered
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    wanted = [p.name for p in parameters if p.name in named and p.default is p.empty and p.name not in offered]
    if wanted:
        raise RewardError(
            f"reward {name!r} takes {', '.join(map(repr, wanted))}, which the data does not have",
            hint=f"it has {', '.join(offered)}",
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    return {key: value for key, value in offered.items() if key in named}


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


def _checked(result: Any, name: str, completions: Sequence[str]) -> list[float | None]:
    # Arrays and tensors say what they hold by tolist(), whatever their library.
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"reward {name!r} returned {_short(result)}, a {type(result).__name__}", hint="a list of numbers is needed"
        )
    if len(values) != len(completions):
        raise RewardError(
            f"reward {name!r} returned {len(values)} numbers for {len(completions)} completions",
            hint="it is called once a batch and must return one number, or None, a completion",
        )
    return [_number(value, index, name, completions[index]) for index, value in enumerate(values)]


def _number(value: Any, index: int, name: str, completion: str) -> float | None:
    value = value.item() if hasattr(value, "item") else value  # a scalar of numpy or torch
    if value is None:
        return None
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    raise RewardError(
        f"reward {name!r} returned {_short(value)} at index {index}, for the reply {_short(completion)}",
        hint="allowed are finite numbers, and None where the reward has no opinion",
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _import_module(path: str, name: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only if the module itself is absent; it may be there and import something that is not.
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            here = sorted(file.stem for file in Path.cwd().glob("*.py"))
            near = difflib.get_close_matches(name, here)
            hint = f"did you mean {' or '.join(near)}?" if near else "it is neither installed nor in the current folder"
            raise RewardError(f"reward {path!r}: no module {name!r}", hint=hint) from None
        raise _import_failed(path, error) from error
    except Exception as error:
        raise _import_failed(path, error) from error


def _import_file(path: str, file: Path) -> ModuleType:
    if not file.is_file():
        here = [other.name for other in file.parent.glob("*.py")]
        near = difflib.get_close_matches(file.name, here)
        hint = f"did you mean {' or '.join(near)}?" if near else f"looked in {str(file.parent.resolve())!r}"
        raise RewardError(f"reward {path!r}: no file {str(file)!r}", hint=hint)
    _make_importable(file.parent.resolve())
    name = str(file.resolve())  # two files of one name stay apart; dataclasses look their module up by it
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _import_failed(path, error) from error
    return module


def _import_failed(path: str, error: Exception) -> RewardError:
    return RewardError(
        f"reward {path!r}: its module fails with {type(error).__name__}: {error}", hint="try importing it"
    )


def _make_importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
