"""Replies in files, see `records.store`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mara_integrations.engine.sequence import JudgedPosition
from mara_integrations.training.records import store
from mara_integrations.training.rollouts.replies import Reply

_POSITION = ("index", "token_ids", "hazard_logits", "states", "previous")


def load_or_generate(path: Path, generate: Callable[[], list[Reply]]) -> tuple[list[Reply], bool]:
    """Return the replies of a file, or generate them and write the file; and whether the file was there.

    States are rounded to half precision either way, so that a resumed run and an uninterrupted one see the same
    numbers.

    Raises:
        OutputError: If the file can't be written.
    """
    replies = _load(path)
    if replies is not None:
        return replies, True
    packed = [_packed(reply) for reply in generate()]
    store.save(path, packed)
    replies = _load(path)  # None if another run has removed the file meanwhile
    return [_unpacked(item) for item in packed] if replies is None else replies, False


def _load(path: Path) -> list[Reply] | None:
    data = store.load(path)
    try:
        return None if data is None else [_unpacked(item) for item in data]
    except (KeyError, TypeError, ValueError):  # the file holds something else
        return None


def _packed(reply: Reply) -> dict[str, Any]:
    positions = [
        (p.index, p.token_ids, p.hazard_logits, p.states.half().cpu(), p.previous.half().cpu()) for p in reply.positions
    ]
    return {**store.as_dict(reply), "positions": positions}


def _unpacked(item: dict[str, Any]) -> Reply:
    positions = [JudgedPosition(**dict(zip(_POSITION, values, strict=True))) for values in item["positions"]]
    return Reply(**{**item, "positions": positions})
