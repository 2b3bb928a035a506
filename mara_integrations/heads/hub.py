"""Locate heads: tell a local path from a Hub id, download, and upload."""

from __future__ import annotations

import difflib
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mara_integrations.errors import HeadError, OutputError
from mara_integrations.files import write_atomically
from mara_integrations.heads.config import REWARD_MODEL, HeadConfig, RewardFile
from mara_integrations.heads.folder import (
    CARD_FILE,
    CONFIG_FILE,
    REWARDS_FOLDER,
    WEIGHTS_FILE,
    first_line,
    read_config,
    read_file,
)

HUB_PREFIX = "hf:"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CHECKPOINTS = (".pth", ".pt")
_MAX_SHOWN = 200  # characters of a name in a message
# Settings of a training, and fields of a reward's description, that may hold paths.
_PATH_SETTINGS = ("data", "judge", "model", "output", "path", "prompts", "reward", "source")
_MAX_FILE_BYTES = 1 << 30  # of what is uploaded


@dataclass(frozen=True, slots=True)
class Location:
    """The location of a head on this disk.

    Attributes:
        name: The head as the user named it.
        path: Its folder or checkpoint, absolute.
        is_folder: Whether it is a folder; else a published actor.
    """

    name: str
    path: Path
    is_folder: bool


def locate(source: str | Path) -> Location:
    """Find a head: a local path, or a Hub id, of which the local copy is returned.

    `hf:org/name` or `hf:org/name@revision` is always on the Hub. A path object, `./x`, `../x`, `/x`, `~/x` or a `.pth`
    file is always local. A bare `org/name` is local if it exists, or if there is a folder `org`; else it is on the Hub.

    Raises:
        HeadError: If there is none.
    """
    name = str(source)
    shown = repr(name if len(name) <= _MAX_SHOWN else f"{name[:_MAX_SHOWN]}…")
    if name.startswith(HUB_PREFIX):
        repo_id, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
        return Location(name, _download(repo_id, revision or None), True)
    try:
        path = Path(source).expanduser().absolute()
        is_folder, is_file = path.is_dir(), path.is_file()
        has_folder_above = path.parent.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, not allowed, an unknown `~user`, a NUL byte
        raise HeadError(f"no head at {shown}: {type(error).__name__}") from None
    if is_folder or is_file:
        return Location(name, path, is_folder)
    is_local = isinstance(source, Path) or name.startswith((".", "~")) or path.suffix in _CHECKPOINTS
    if not is_local and not has_folder_above and _HUB_ID.fullmatch(name):
        return Location(name, _download(name), True)
    what = "file" if path.suffix in _CHECKPOINTS else "folder"
    hint = "name a head's folder, a published .pth actor, or a Hub id"
    heads_beside = [config.parent.name for config in path.parent.glob(f"*/{CONFIG_FILE}")]
    near = difflib.get_close_matches(path.name, heads_beside, n=1)
    if near:
        hint = f"did you mean {str(Path(source).with_name(near[0]))!r}? Otherwise, {hint}"
    if _HUB_ID.fullmatch(name):
        hint += f"; {HUB_PREFIX}{name} is one on the Hub"
    raise HeadError(f"no head at {shown}: there is no such {what}", hint=hint)


def _download(repo_id: str, revision: str | None = None) -> Path:
    """Return the local copy of a head on the Hub, from the cache when there is no network.

    Raises:
        HeadError: If there is none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = [WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, f"{REWARDS_FOLDER}/*.safetensors"]
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted))
    except HFValidationError:
        reason = "it is not a Hub id"
    except Exception as error:  # not found, gated, offline: each means that there is no head
        reason = f"there is no such folder, and the Hub gave none ({type(error).__name__})"
    raise HeadError(
        f"no head at {repo_id!r}: {reason}", hint="name a head's folder, a published .pth actor, or a Hub id"
    )


def push_folder(folder: str | Path, repo_id: str, *, public: bool = False, token: str | None = None) -> str:
    """Upload a head: its weights, config, card and reward models, and nothing else that lies in its folder.

    Paths of this machine in the config are shortened to file names.

    Args:
        folder: The head's folder.
        repo_id: Repository on the Hub; made if there is none, private unless `public`.
        public: Everybody may read it.
        token: Access token; None takes the one of `hf auth login`.

    Returns:
        Address of the commit.

    Raises:
        HeadError: If the folder holds no head.
        OutputError: If the repository is public, and `public` is False.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    _check_private(api, repo_id, public)
    config = read_config(Path(folder))
    shared = _without_paths(config)
    files = [WEIGHTS_FILE]
    files += [RewardFile(**spec).file for spec in config.rewards if spec.get("kind") == REWARD_MODEL]
    with tempfile.TemporaryDirectory() as upload:
        for name in files:
            write_atomically(Path(upload, name), read_file(Path(folder), name, _MAX_FILE_BYTES))
        card = read_file(Path(folder), CARD_FILE, _MAX_FILE_BYTES).decode(errors="replace")
        if config.base_model is not None and shared.base_model is not None:
            card = card.replace(config.base_model, shared.base_model)
        write_atomically(Path(upload, CARD_FILE), card)
        write_atomically(Path(upload, CONFIG_FILE), shared.model_dump_json(indent=2) + "\n")
        api.create_repo(repo_id, private=not public, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=upload, commit_message="Upload MARA head"))


def check_can_push(repo_id: str, *, public: bool = False) -> None:
    """Check before the work that the Hub would take its result.

    Raises:
        OutputError: If nobody is logged in, the Hub can't be reached, or the repository is public and `public` is
            False.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.whoami()
    except Exception as error:  # no token, a wrong one, no network
        raise OutputError(
            f"can't push to {repo_id!r}: {first_line(error)}", hint="log in with `hf auth login`, or set HF_TOKEN"
        ) from None
    _check_private(api, repo_id, public)


def _check_private(api: Any, repo_id: str, public: bool) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    if public:
        return
    try:
        is_private = api.repo_info(repo_id).private
    except RepositoryNotFoundError:
        return
    except Exception as error:
        raise OutputError(f"can't push to {repo_id!r}: {first_line(error)}") from None
    if not is_private:
        raise OutputError(f"{repo_id!r} is public: everybody could read the head", hint="--public allows that")


def _without_paths(config: HeadConfig) -> HeadConfig:
    """The config with absolute paths of this machine shortened to file names."""

    def shortened(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {key: shortened(item, key) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [shortened(item, key) for item in value]
        is_path = key in _PATH_SETTINGS and isinstance(value, str) and Path(value).is_absolute()
        return Path(value).name if is_path else value

    return config.model_copy(
        update={
            "base_model": shortened(config.base_model, "model"),
            "rewards": tuple(shortened(config.rewards, "")),
            "training": shortened(config.training, ""),
        }
    )
