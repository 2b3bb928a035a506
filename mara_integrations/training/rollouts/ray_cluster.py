"""What rollout workers and rewards on Ray share: the import, and how often a lost actor is replaced."""

from __future__ import annotations

from typing import Any

from mara_integrations.errors import MissingExtraError

MAX_LOSSES = 3  # actors lost on one piece of work: what kills one each time will kill the next


def import_ray() -> Any:
    """Return the module `ray`.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtraError("--ray needs ray", hint="pip install 'mara-integrations[ray]'") from None
    return ray


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; Ray's messages go on for pages."""
    return str(error).strip().split("\n")[0]
