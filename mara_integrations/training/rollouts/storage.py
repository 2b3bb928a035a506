"""Replies in files, see `records.store`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mara_integrations.engine.sequence import JudgedPosition
from mara_integrations.training.records import store
from mara_integrations.training.rollouts.replies import Reply


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
    packed = _packed(generate())
    store.save(path, packed)
    replies = _load(path)  # None if another run has removed the file meanwhile
    return _unpacked(packed) if replies is None else replies, False


def _load(path: Path) -> list[Reply] | None:
    data = store.load(path)
    try:
        return None if data is None else _unpacked(data)
    except (KeyError, TypeError, ValueError):  # the file holds something else
        return None


def _packed(replies: Sequence[Reply]) -> dict[str, Any]:
    """Return the replies as a few large tensors: thousands of small ones take long to write and to read."""
    positions = [position for reply in replies for position in reply.positions]
    return {
        "prompt_index": [reply.prompt_index for reply in replies],
        "text": [reply.text for reply in replies],
        "token_ids": _joined_numbers([reply.token_ids for reply in replies], torch.long),
        "log_probs": _joined_numbers([reply.log_probs for reply in replies], torch.double),
        "states": _joined_states([reply.states for reply in replies]),
        "num_positions": [len(reply.positions) for reply in replies],
        "positions": {
            "index": torch.tensor([position.index for position in positions], dtype=torch.long),
            "token_ids": _joined_numbers([position.token_ids for position in positions], torch.long),
            "hazard_logits": _joined_numbers([position.hazard_logits for position in positions], torch.double),
            "states": _joined_states([position.states for position in positions]),
            "previous": _joined_states([position.previous[None] for position in positions]),
        },
    }


def _unpacked(data: Mapping[str, Any]) -> list[Reply]:
    stored = data["positions"]
    positions = map(
        JudgedPosition,
        stored["index"].tolist(),
        _numbers(stored["token_ids"]),
        _numbers(stored["hazard_logits"]),
        _states(stored["states"]),
        [previous[0] for previous in _states(stored["previous"])],
    )
    fields = zip(
        data["prompt_index"],
        data["text"],
        _numbers(data["token_ids"]),
        _states(data["states"]),
        data["num_positions"],
        _numbers(data["log_probs"]),
        strict=True,
    )
    return [
        Reply(prompt_index, text, tuple(token_ids), states, list(islice(positions, count)), tuple(log_probs))
        for prompt_index, text, token_ids, states, count, log_probs in fields
    ]


def _joined_numbers(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the numbers of all rows, one after the other, and how many each row has."""
    return torch.tensor([number for row in rows for number in row], dtype=dtype), _lengths(rows)


def _numbers(joined: tuple[Tensor, Tensor]) -> list[list[Any]]:
    numbers = iter(joined[0].tolist())
    return [list(islice(numbers, length)) for length in joined[1].tolist()]


def _joined_states(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the states of all rows, (N, d) in half precision, and how many each row has."""
    states = torch.cat([row.half() for row in rows]).cpu() if rows else torch.zeros(0).half()
    return states, _lengths(rows)


def _states(joined: tuple[Tensor, Tensor]) -> list[Tensor]:
    return list(joined[0].split(joined[1].tolist()))


def _lengths(rows: Sequence[Any]) -> Tensor:
    return torch.tensor([len(row) for row in rows], dtype=torch.long)
