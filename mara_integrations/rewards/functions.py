"""Imports reward functions of users by module or file."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from mara_integrations.errors import RewardError


class FunctionReward:
    """A user's reward function and the path it was imported by, which a head's config keeps.

    Args:
        path: Path that was given to `load_reward`.
        function: Function that was found there.
    """

    def __init__(self, path: str, function: Callable[..., Any]) -> None:
        self.path = path
        self.__name__ = path.rpartition(":")[2]
        self.__wrapped__ = function  # inspect.signature follows it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.__wrapped__(*args, **kwargs)

    @property
    def takes_partial_text(self) -> bool:
        """Whether the function can score unfinished replies, by its own attribute."""
        return bool(getattr(self.__wrapped__, "takes_partial_text", False))

    def spec(self) -> dict[str, Any]:
        """Return the JSON description that `reward_from_spec` imports the same function by."""
        return {"kind": "function", "path": self.path}

    def __repr__(self) -> str:
        return f"load_reward({self.path!r})"


def load_reward(path: str) -> FunctionReward:
    """Import a reward function: `package.module:function` or `folder/rewards.py:function`.

    The current folder, and the folder of the file, are added to the import path and stay there, because a function may
    import when it is called.

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
        near = difflib.get_close_matches(name, functions)
        there_are = f"it has {', '.join(functions[:5])}" if functions else "it has no function at all"
        hint = f"did you mean {' or '.join(near)}?" if near else there_are
        raise RewardError(f"reward {path!r}: {place} has no {name!r}", hint=hint)
    function = getattr(module, name)
    if isinstance(function, type) or not callable(function):
        what = "a class" if isinstance(function, type) else f"a {type(function).__name__}"
        raise RewardError(f"reward {path!r} is {what}, not a function", hint="name a function or a callable object")
    return FunctionReward(path, function)


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
