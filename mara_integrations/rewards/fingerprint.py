"""Fingerprints of rewards: hashes that change when a reward may score the same reply differently."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from mara_integrations.rewards.combined import CombinedReward
from mara_integrations.rewards.functions import FunctionReward
from mara_integrations.rewards.protocol import Reward


def reward_fingerprint(reward: Reward) -> str:
    """Return a hash of a reward's description and of the code behind it.

    The code of a function is its module's file, and the files beside it that the module uses. Of a function that was
    defined in a notebook or a script, it is the function's own source, and that of the functions it calls there.

    Raises:
        RewardError: If a reward model of the Hub can't be found.
    """
    return hashlib.sha256(json.dumps(_description(reward), sort_keys=True, default=str).encode()).hexdigest()


def _description(reward: Reward) -> Any:
    if isinstance(reward, CombinedReward):
        parts = [[_description(part), weight] for part, weight in reward.weighted]
        return {"parts": parts, "normalise": reward.normalise}
    if hasattr(reward, "fingerprint"):
        return reward.fingerprint()
    if isinstance(reward, FunctionReward):
        return _code(reward.__wrapped__)
    return reward.spec() if hasattr(reward, "spec") else _code(reward)


def _code(function: Any) -> Any:
    """Return the source code of a function or callable object, with the plain values it holds."""
    if isinstance(function, functools.partial):
        return [_code(function.func), _plain(function.args), _plain(function.keywords)]
    function = inspect.unwrap(function)
    held = [_plain(getattr(function, "__dict__", None)), _plain(getattr(function, "__defaults__", None))]
    held += [_plain(cell.cell_contents) for cell in getattr(function, "__closure__", None) or () if _is_filled(cell)]
    owner = function if hasattr(function, "__qualname__") else type(function)
    module = sys.modules.get(owner.__module__)
    file = _file(module)
    if module is None or file is None or module.__name__ == "__main__":
        return [list(_sources(owner, set())), held]
    files = sorted({str(path.name): path for path in _files(module, file.parent, set())}.items())
    return [owner.__qualname__, [[name, hashlib.sha256(path.read_bytes()).hexdigest()] for name, path in files], held]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is not bound yet
        return False


def _plain(value: Any) -> str:
    """Return plain values as JSON; of others, only the type: what they print may differ from process to process."""
    return json.dumps(value, sort_keys=True, skipkeys=True, default=lambda other: type(other).__qualname__)


def _file(module: ModuleType | None) -> Path | None:
    name = getattr(module, "__file__", None)
    return Path(name) if name is not None and Path(name).is_file() else None


def _files(module: ModuleType, folder: Path, seen: set[str]) -> Iterator[Path]:
    """Yield the file of a module, and those of the modules it uses from the same folder."""
    file = _file(module)
    if file is None or module.__name__ in seen or not file.resolve().is_relative_to(folder.resolve()):
        return
    seen.add(module.__name__)
    yield file
    for value in list(vars(module).values()):
        used = value if isinstance(value, ModuleType) else sys.modules.get(getattr(value, "__module__", None) or "")
        if used is not None and used.__name__ != "__main__":
            yield from _files(used, folder, seen)


def _sources(owner: Any, seen: set[str]) -> Iterator[str]:
    """Yield the source of a function or class, and of the functions it names that stand beside it."""
    if owner.__qualname__ in seen:
        return
    seen.add(owner.__qualname__)
    try:
        yield inspect.getsource(owner)
    except (OSError, TypeError):  # typed into an interpreter: its instructions tell as much
        yield _instructions(owner.__code__) if isinstance(owner, FunctionType) else owner.__qualname__
    if isinstance(owner, FunctionType):
        for name in owner.__code__.co_names:
            used = owner.__globals__.get(name)
            if isinstance(used, FunctionType | type) and used.__module__ == owner.__module__:
                yield from _sources(used, seen)


def _instructions(code: CodeType) -> str:
    constants = [_instructions(each) if isinstance(each, CodeType) else repr(each) for each in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"
