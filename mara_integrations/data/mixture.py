"""Mixtures: a YAML file that names several sources and the share of rows that each contributes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from mara_integrations.data.rows import Dataset, Row, canonical
from mara_integrations.errors import ConfigError, DataError
from mara_integrations.sampling import Params

SUFFIXES = (".yaml", ".yml")


class Source(Params):
    """One source of a mixture.

    Attributes:
        path: File, folder or Hub name; a relative path starts at the YAML file.
        weight: Share of the rows, relative to the weights of the other sources.
        format: See `read_dataset`.
        columns: See `read_dataset`.
    """

    path: str
    weight: float | None = Field(None, gt=0.0)
    format: str = "auto"
    columns: Mapping[str, str] = {}


class Mixture(Params):
    """The content of a mixture's file.

    Attributes:
        sources: At least one source. If none has a weight, all rows of all sources are taken.
    """

    sources: tuple[Source, ...] = Field(min_length=1)


def read_mixture(path: Path, read: Callable[[str, Source], Dataset]) -> Dataset:
    """Read all sources, and take as many rows as the weights allow without taking one twice.

    Args:
        path: The YAML file.
        read: Reads one source, given its path resolved against the YAML file.

    Raises:
        DataError: If the file is missing or is not a mixture, or if the sources are of several kinds.
    """
    try:
        with path.open(encoding="utf-8") as file:  # whose name is in errors
            mixture = Mixture.of(**_mapping(path, yaml.safe_load(file)))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except yaml.YAMLError as error:
        raise DataError(f"{path}: broken YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise DataError(f"{path}: {error.message}", hint=error.hint) from None
    weights = [source.weight for source in mixture.sources]
    if None in weights and any(weights):
        raise DataError(f"{path}: some sources have a weight and some have none", hint="give all one, or none")
    parts = [read(_from_here(path, source.path), source) for source in mixture.sources]
    kinds = {part.kind for part in parts}
    if len(kinds) > 1:
        raise DataError(
            f"{path} mixes {', '.join(f'{part.path} ({part.kind})' for part in parts)}",
            hint="all sources of a mixture are of one kind; --format prompts reads all as prompts",
        )
    # The source that is used up first bounds the number.
    per_weight = min(len(part) / (weight or 1.0) for part, weight in zip(parts, weights, strict=True))
    rows: list[Row] = []
    notes: list[str] = []
    for part, weight in zip(parts, weights, strict=True):
        taken = part.rows if weight is None else _some(part.rows, max(1, round(weight * per_weight)))
        rows += taken
        notes += [f"{len(taken)} of {len(part)} rows from {part.path}", *part.notes]
    forms = {part.form for part in parts}
    return replace(
        parts[0],
        rows=tuple(rows),
        path=path,
        form="standard" if forms == {"standard"} else "conversational",
        notes=tuple(notes),
    )


def _some(rows: tuple[Row, ...], count: int) -> tuple[Row, ...]:
    """Return some rows in file order, chosen by a hash of their content, so that the choice ignores their order."""
    ranked = sorted(range(len(rows)), key=lambda i: hashlib.sha256(canonical(rows[i]).encode()).digest())
    return tuple(rows[i] for i in sorted(ranked[:count]))


def _from_here(path: Path, source: str) -> str:
    beside = path.parent / source
    return str(beside) if Path(str(beside).partition(":")[0]).exists() or Path(source).suffix else source


def _mapping(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise DataError(
            f"{path} is not a mixture",
            hint="it has a list 'sources', each with a path, and a weight if they have shares",
        )
    return {str(name): value for name, value in content.items()}
