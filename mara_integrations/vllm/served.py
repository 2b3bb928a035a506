"""What the processes of one server know of each other: the folder of heads, and the width of the model that is served.

Requests are checked in vLLM's front end, which does not tell plug-ins about the model; the worker, which does, leaves
the model's width in a folder that both find by an environment variable.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from pathlib import Path

from mara_integrations.errors import ConfigError
from mara_integrations.models.options import VLLM_HEADS_VARIABLE

HEADS_VARIABLE = "MARA_HEADS"
_SERVED_VARIABLE = "MARA_VLLM_SERVED"
_PLAIN_NAME = re.compile(r"[^\s/\\:=.\x00-\x1f][^\s/\\:=\x00-\x1f]{0,199}")


def is_active() -> bool:
    """Whether this server, or an engine in this process, has heads."""
    return bool(_named_folder())


def heads_folder() -> Path:
    """Return the folder whose subfolders are heads.

    Raises:
        ConfigError: If none is named, or it is not a folder.
    """
    named = _named_folder()
    if not named:
        raise ConfigError("this server has no heads", hint=f"start it with {HEADS_VARIABLE}=FOLDER, a folder of heads")
    folder = Path(named).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(
            f"{HEADS_VARIABLE}={named!r} is not a folder", hint="name the folder whose subfolders are heads"
        )
    return folder


def _named_folder() -> str | None:
    """Return the server's folder, else the one that `MARALLM(engine="vllm")` keeps for its own."""
    return os.environ.get(HEADS_VARIABLE) or os.environ.get(VLLM_HEADS_VARIABLE)


def head_folder(name: str, folder: Path) -> Path:
    """Return where a head lies.

    Args:
        name: Plain name of a subfolder; a request says it.
        folder: The folder of heads.

    Raises:
        ConfigError: If it is not a plain name, or there is no such subfolder.
    """
    own = os.environ.get(VLLM_HEADS_VARIABLE)
    if own and _PLAIN_NAME.fullmatch(name) and Path(own, name).is_dir():
        return Path(own, name)
    if not _PLAIN_NAME.fullmatch(name) or not (folder / name).is_dir():
        known = sorted(path.name for path in folder.iterdir() if path.is_dir() and _PLAIN_NAME.fullmatch(path.name))
        shown = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
        raise ConfigError(f"no head {name[:200]!r} is served", hint=f"heads are {shown}" if known else "there is none")
    return folder / name


def prepare() -> None:
    """Make the folder for `publish`; the processes that this one starts inherit its name."""
    if _SERVED_VARIABLE not in os.environ:
        folder = tempfile.mkdtemp(prefix="mara-vllm-")
        os.environ[_SERVED_VARIABLE] = folder
        atexit.register(_remove, folder, os.getpid())


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # and not a process forked from it
        shutil.rmtree(folder, ignore_errors=True)


def publish(hidden_size: int, model: str) -> None:
    """Tell the front end which model is served; nothing where it is on another machine."""
    folder = Path(os.environ.get(_SERVED_VARIABLE, ""))
    if _SERVED_VARIABLE in os.environ and folder.is_dir():
        public = Path(model).name if Path(model).exists() else model  # a client must not read where the model lies
        (folder / str(hidden_size)).write_text(public, encoding="utf-8")


def served_models() -> dict[int, str]:
    """Names of the models that are served, by hidden size; empty where the workers are on other machines."""
    if _SERVED_VARIABLE not in os.environ:
        return {}
    try:
        files = list(Path(os.environ[_SERVED_VARIABLE]).iterdir())
        return {int(file.name): file.read_text(encoding="utf-8") for file in files}
    except OSError:
        return {}
