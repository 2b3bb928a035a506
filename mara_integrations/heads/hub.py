"""Heads on the Hugging Face Hub: download and upload."""

from __future__ import annotations

from pathlib import Path

from mara_integrations.errors import HeadError, OutputError
from mara_integrations.heads.folder import CARD_FILE, CONFIG_FILE, REWARDS_FOLDER, WEIGHTS_FILE


def head_folder(source: str | Path) -> Path:
    """Return a head's folder: the one that is named, or the local copy of a Hub id.

    Raises:
        HeadError: If it is neither.
    """
    path = Path(source).expanduser()
    return path if path.is_dir() else download(str(source))


def download(repo_id: str) -> Path:
    """Return the local copy of a head on the Hub, from the cache when there is no network.

    Raises:
        HeadError: If there is none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            snapshot_download(repo_id, allow_patterns=[WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, f"{REWARDS_FOLDER}/*"])
        )
    except HFValidationError:
        reason = "there is no such folder, and it is not a Hub id"
    except Exception as error:  # not found, gated, offline: each means that there is no head
        reason = f"there is no such folder, and the Hub gave none ({type(error).__name__})"
    raise HeadError(
        f"no head at {repo_id!r}: {reason}", hint="name a head's folder, a published .pth actor, or a Hub id"
    )


def push_folder(folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a head's folder with all that the trainer wrote beside it; returns the address of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Upload MARA head", ignore_patterns=[".*", ".*/**"]
        )
    )


def check_can_push(repo_id: str) -> None:
    """Check before the work that the Hub would take its result.

    Raises:
        OutputError: If nobody is logged in, or the Hub can't be reached.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # no token, a wrong one, no network
        reason = str(error).strip().split("\n")[0]
        raise OutputError(
            f"can't push to {repo_id!r}: {reason}", hint="log in with `hf auth login`, or set HF_TOKEN"
        ) from None
