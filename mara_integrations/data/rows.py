"""Rows of preference data, and sets of them with a fingerprint, which are split by prompt."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mara_integrations.errors import ConfigError, DataError
from mara_integrations.messages import Message, Tool

Kind = Literal["pairs", "labelled", "prompts"]
Form = Literal["standard", "conversational"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with a preferred reply and a rejected one; `tools` may be called in the conversation."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class Labelled:
    """A prompt with one reply that is labelled good (True) or bad (False)."""

    prompt: tuple[Message, ...]
    completion: str
    label: bool
    source: str
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt alone; `columns` are the row's other fields, passed to reward functions."""

    prompt: tuple[Message, ...]
    columns: dict[str, Any]
    source: str
    tools: tuple[Tool, ...] = ()


Row: TypeAlias = Pair | Labelled | PromptRow


@dataclass(frozen=True, slots=True)
class Dataset:
    """Checked rows of one kind.

    Attributes:
        kind: Kind of the rows.
        rows: Rows in file order.
        path: Path that they were read from.
        form: `standard` where every prompt was a string, else `conversational`; reward functions get prompts in it.
        notes: Sentences on how the rows were understood, and which were left out.
        fingerprint: SHA-256 of the kind and the rows' content, in order; it does not depend on the file's format.
    """

    kind: Kind
    rows: tuple[Row, ...]
    path: Path
    form: Form = "standard"
    notes: tuple[str, ...] = ()
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.kind.encode())
        for row in self.rows:
            digest.update(b"\n" + canonical(row).encode())
        object.__setattr__(self, "fingerprint", digest.hexdigest())  # the class is frozen

    def __len__(self) -> int:
        return len(self.rows)


def prompt_row(row: Row) -> PromptRow:
    """Return the prompt of a row alone; a row of another kind has no columns."""
    return row if isinstance(row, PromptRow) else PromptRow(row.prompt, {}, row.source, row.tools)


def gather_columns(rows: Iterable[PromptRow]) -> dict[str, list[Any]]:
    """Return the other fields of rows by column, as reward functions get them; None where a row lacks one."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row.columns)
    return {name: [row.columns.get(name) for row in rows] for name in names}


def split(dataset: Dataset, held_out: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split rows by prompt: rows whose prompts differ in case or spacing alone stay on one side.

    Prompts are ranked by a hash of seed and content and the first ones are held out, so a prompt's rank does not depend
    on the file's order or on its other rows, and a larger `held_out` holds out a superset. Of labelled replies, both
    sides get good and bad ones where that is possible: other prompts then take the place of the first ones.

    Args:
        dataset: Rows to split.
        held_out: Share of the distinct prompts to hold out, above 0 and below 1; at least one prompt is.
        seed: Seed of the ranking.

    Returns:
        The rows to train on and the rows held out, each in file order.

    Raises:
        ConfigError: If `held_out` is not between 0 and 1.
        DataError: If there are fewer than two distinct prompts.
    """
    if not 0 < held_out < 1:
        raise ConfigError(f"held_out={held_out!r} is not allowed", hint="a share above 0 and below 1, such as 0.1")
    keys = [prompt_key(row) for row in dataset.rows]
    ranked = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())
    if len(ranked) < 2:
        raise DataError(
            f"{dataset.path}: all {len(keys)} rows have the same prompt, so none can be held out",
            hint="give at least two distinct prompts",
        )
    count = min(max(1, round(held_out * len(ranked))), len(ranked) - 1)
    chosen = _stratified(dataset, keys, ranked, count) if dataset.kind == "labelled" else set(ranked[:count])
    sides = (
        tuple(row for row, key in zip(dataset.rows, keys, strict=True) if (key in chosen) is is_held_out)
        for is_held_out in (False, True)
    )
    train, test = (replace(dataset, rows=side) for side in sides)
    return train, test


def _stratified(dataset: Dataset, keys: Sequence[str], ranked: Sequence[str], count: int) -> set[str]:
    """Return the prompts to hold out: the first ones, or where these leave a side without a label, others.

    They are the first ones again where no choice of prompts gives both sides both labels.
    """
    labels: dict[str, set[bool]] = {}
    for key, row in zip(keys, dataset.rows, strict=True):
        labels.setdefault(key, set()).update([row.label] if isinstance(row, Labelled) else [])
    total = Counter(label for of_prompt in labels.values() for label in of_prompt)

    def is_split(held_out: Sequence[str]) -> bool:
        count = Counter(label for prompt in held_out for label in labels[prompt])
        return all(0 < count[label] < total[label] for label in (True, False))

    first = list(ranked[:count])
    if is_split(first) or min(total[True], total[False]) < 2:
        return set(first)
    # One prompt with both labels, or one prompt of each; as each label has two prompts, one of these leaves both
    # labels on the other side too.
    both = [prompt for prompt in ranked if len(labels[prompt]) == 2]
    one_each = [next((p for p in ranked if labels[p] == {label}), ranked[0]) for label in (True, False)]
    held_out = next(choice for choice in (*([prompt] for prompt in both), one_each) if is_split(choice))
    left = total - Counter(label for prompt in held_out for label in labels[prompt])
    for prompt in ranked:
        if len(held_out) < count and prompt not in held_out and all(left[label] > 1 for label in labels[prompt]):
            held_out.append(prompt)
            left.subtract(labels[prompt])
    return set(held_out)


def prompt_key(row: Row) -> str:
    """Return a key that is equal for rows whose prompts differ in case or spacing alone."""
    turns = [[turn[0], " ".join(turn[1].split()).casefold(), *turn[2:]] for turn in _turns(row)]
    return json.dumps([turns, *_tools(row)] if row.tools else turns, default=str)


def canonical(row: Row) -> str:
    """Return the content of a row as one line, independent of the file that it came from."""
    content: list[Any] = [_turns(row), *_tools(row)]
    if isinstance(row, Pair):
        content += [row.chosen, row.rejected]
    elif isinstance(row, Labelled):
        content += [row.completion, row.label]
    else:
        content += [row.columns]
    return json.dumps(content, sort_keys=True, default=str)


def _turns(row: Row) -> list[list[Any]]:
    return [
        [message.role, message.content, *([call.name, call.arguments] for call in message.tool_calls)]
        for message in row.prompt
    ]


def _tools(row: Row) -> list[Any]:
    return [[[tool.name, tool.description, tool.parameters] for tool in row.tools]] if row.tools else []
