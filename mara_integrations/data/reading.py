"""Reads preference data from any source into checked rows; every error names the file and the line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from mara_integrations.data import trl
from mara_integrations.data.columns import parse_columns, renamed
from mara_integrations.data.exports import Export, check_has_runs, export_of, rows_of_export
from mara_integrations.data.mixture import SUFFIXES, Source, read_mixture
from mara_integrations.data.records import BadRowError, Fields, Record, read_records, records_of
from mara_integrations.data.rows import Dataset, Kind, PromptRow, Row, prompt_key, prompt_row
from mara_integrations.data.suspicions import suspicions
from mara_integrations.errors import ConfigError, DataError

Format = Literal["auto", "pairs", "labelled", "prompts", "langsmith", "langfuse"]
ROWS = Path("<rows>")  # stands for a file in messages about Python objects
_SHOWN_SKIPS = 3


def read_dataset(
    source: Any,
    format: Format = "auto",
    *,
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
) -> Dataset:
    """Read and check rows of a file, a folder that `datasets` saved, the Hub, a YAML mixture or Python objects.

    A field that is null, or an empty CSV cell, is absent. A string prompt becomes one user message. A string reply
    loses its leading white space, because TRL's standard form writes the space between prompt and reply there, while
    a chat template separates them here. In CSV, messages are JSON text. Rows are numbered as editors and spreadsheets
    show them.

    Args:
        source: JSONL, JSON, CSV or Parquet file; a folder saved by `datasets`, or a Hub name, either with `:split`; a
            `.yaml` file of a mixture, see `mixture.Mixture`; or rows: dicts, a `datasets.Dataset` or a DataFrame.
        format: Kind of the rows, or the platform they were exported from; `auto` goes by the columns.
        columns: Columns of other names by ours, as `{"prompt": "question", "label": "stars>=4"}`; in an export, `label`
            is the name of the feedback.
        skip_bad_rows: Leave out bad rows, if there are good ones, and report them in `notes`.

    Raises:
        ConfigError: If `format` or a column is not allowed.
        DataError: If the source can't be read or a row is bad; names the first bad row and how many there are.
        MissingExtraError: If the package that reads the source is not installed.

    Source: TRL's dataset formats and types.
    """
    if format not in get_args(Format):
        raise ConfigError(f"format={format!r} is not allowed", hint=f"formats are {', '.join(get_args(Format))}")
    if isinstance(source, Dataset):
        return source
    path = Path(source) if isinstance(source, str | os.PathLike) else ROWS
    if path.suffix.lower() in SUFFIXES:

        def read_source(place: str, source: Source) -> Dataset:
            chosen = cast(Format, source.format) if source.format != "auto" else format  # checked below
            merged = {**(columns or {}), **source.columns}
            return read_dataset(place, chosen, columns=merged, skip_bad_rows=skip_bad_rows)

        return read_mixture(path, read_source)
    records = list(read_records(path) if path is not ROWS else records_of(source))
    if not records:
        raise DataError(f"{path} is empty: it has no rows", hint=trl.WANTED)
    records, notes = _as_trl(path, records, format, columns or {})
    if not records:
        raise DataError(f"{path} has no row to use: {'; '.join(notes)}")
    kind = trl.infer_kind(path, records) if format in ("auto", "langsmith", "langfuse") else cast(Kind, format)
    rows, bad = _checked(path, records, kind)
    if bad and not (skip_bad_rows and rows):
        source, first = bad[0]
        count = f"{len(bad)} of {len(records)} rows {'are bad; the first is shown' if len(bad) > 1 else 'is bad'}"
        raise DataError(f"{source}: {first} ({count})", hint=first.hint)
    if bad:
        shown = "; ".join(f"{source}: {error}" for source, error in bad[:_SHOWN_SKIPS])
        more = f"; and {len(bad) - _SHOWN_SKIPS} more" if len(bad) > _SHOWN_SKIPS else ""
        notes.append(f"{len(bad)} of {len(records)} rows are left out: {shown}{more}")
    notes += suspicions(records, rows)
    is_conversational = any(isinstance(record, dict) and _has_messages(record) for _, record in records)
    return Dataset(kind, tuple(rows), path, "conversational" if is_conversational else "standard", tuple(notes))


def read_prompts(
    source: Any,
    format: Format = "auto",
    *,
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
) -> Dataset:
    """Return the prompts of a source, each once, in file order; arguments and errors are those of `read_dataset`."""
    return prompts_of(read_dataset(source, format, columns=columns, skip_bad_rows=skip_bad_rows))


def prompts_of(dataset: Dataset) -> Dataset:
    """Return the prompts of rows of any kind, each once, in their order."""
    first: dict[str, PromptRow] = {}
    for row in dataset.rows:
        first.setdefault(prompt_key(row), prompt_row(row))
    return replace(dataset, kind="prompts", rows=tuple(first.values()))


def _as_trl(
    path: Path, records: list[Record], format: Format, columns: Mapping[str, str]
) -> tuple[list[Record], list[str]]:
    """Return rows with TRL's columns, and notes on how the source was understood."""
    check_has_runs(path, records)
    wanted = parse_columns(columns)
    export: Export | None = format if format in ("langsmith", "langfuse") else None
    export = export or (export_of(records) if format == "auto" else None)
    if export is not None:
        return rows_of_export(path, export, records, wanted)
    if not wanted:
        return records, []
    readable = [record for _, record in records if isinstance(record, dict)]
    for name, column in wanted.items():
        if readable and all(column.absent_from(record) for record in readable):
            raise DataError(
                f"{path} has no column {column.path!r}, which {name!r} was to be read from",
                hint=f"its columns are {', '.join(dict.fromkeys(key for record in readable for key in record))}",
            )
    made: list[Record] = []
    for line, record in records:
        try:
            made.append((line, record if isinstance(record, BadRowError) else renamed(record, wanted)))
        except BadRowError as error:
            made.append((line, error))
    return made, []


def _checked(path: Path, records: Sequence[Record], kind: Kind) -> tuple[list[Row], list[tuple[str, BadRowError]]]:
    # An implicit prompt is a way to write a whole file; one row without a prompt is a mistake.
    is_explicit = any(isinstance(record, dict) and {"prompt", "messages"} & record.keys() for _, record in records)
    rows: list[Row] = []
    bad: list[tuple[str, BadRowError]] = []
    for line, record in records:
        source = f"{path}:{line}"
        try:
            if isinstance(record, BadRowError):
                raise record
            if is_explicit and "messages" not in record:
                trl.need(record, "prompt", kind)
            rows.append(trl.READERS[kind](record, source))
        except BadRowError as error:
            bad.append((source, error))
    return rows, bad


def _has_messages(fields: Fields) -> bool:
    return any(isinstance(fields.get(name), list) for name in ("prompt", "chosen", "completion", "messages"))
