"""Reads files, saved data sets, the Hub and Python objects as numbered records; fields have no meaning here.

A row that can't be read becomes an error in its place, so that all bad rows are counted.
"""

from __future__ import annotations

import csv
import difflib
import importlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mara_integrations.errors import DataError, MissingExtraError

Fields: TypeAlias = dict[str, Any]

MAX_DEPTH = 100  # of objects and lists within each other; Python's own limit would be a crash later on


class BadRowError(Exception):
    """An error in one row; the reader of the whole source adds the place."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


Record: TypeAlias = tuple[int, "Fields | BadRowError"]


class RepeatedKeys(dict[str, Any]):
    """A JSON object with a key that stands more than once; the last value counts."""


def read_records(path: Path) -> Iterator[Record]:
    """Yield the rows of a source, numbered as editors and spreadsheets show them; fields that are null are absent.

    Args:
        path: A JSONL, JSON, CSV or Parquet file; a folder that `datasets` saved; or a Hub name. The latter two may end
            in `:split`, and without it are read by their `train` split, or by their only one.

    Raises:
        DataError: If the source is missing, of another form, or broken as a whole.
        MissingExtraError: If the package that reads it is not installed.
    """
    readers: dict[str, Callable[[Path], Iterator[Record]]] = {
        ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet,
    }  # fmt: skip
    folder, _, split = str(path).partition(":")
    if any(os.path.isfile(os.path.join(folder, name)) for name in (_SAVED, _SAVED_SPLITS)):
        yield from _saved(folder, split)
        return
    if os.path.isdir(path):
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in readers)
        raise DataError(f"{path} is a folder", hint=f"name one file in it: {', '.join(inside[:3]) or 'it has none'}")
    reader = readers.get(path.suffix.lower())
    if not os.path.exists(path):
        if reader is None and re.fullmatch(r"[\w.-]+/[\w.-]+", folder) and not os.path.isdir(path.parent):
            yield from _hub(folder, split)
            return
        raise DataError(f"{path} does not exist", hint=_near_files(path))
    if reader is None:
        raise DataError(f"{path} has the ending {path.suffix!r}", hint=f"allowed are {', '.join(readers)}")
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error


def records_of(rows: Any) -> Iterator[Record]:
    """Yield the rows of Python objects, numbered from 1; fields that are null are absent.

    Args:
        rows: Dicts, a `datasets.Dataset`, or a DataFrame.

    Raises:
        DataError: If it holds several splits, or is none of these.
    """
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # pandas, whose iteration gives the columns
        rows = rows.to_dict("records")
    if isinstance(rows, Mapping):
        splits = ", ".join(map(str, rows))
        raise DataError(f"data is a mapping with {splits}", hint="give one split of it, or a list of rows")
    if isinstance(rows, str | bytes) or not isinstance(rows, Iterable):
        raise DataError(f"data is a {type(rows).__name__}", hint="give a list of dicts or a datasets.Dataset")
    yield from ((number, _present(row)) for number, row in enumerate(rows, start=1))


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {str(path.parent)!r}"
    names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    near = difflib.get_close_matches(path.name, names)
    return f"did you mean {' or '.join(near)}?" if near else f"nothing in {str(path.parent)!r} has a name like it"


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: byte {data[error.start]:#04x} is not UTF-8", hint="save it as UTF-8") from None


def _jsonl(path: Path) -> Iterator[Record]:
    # Not splitlines(): it also splits at U+2028 and the like, which JSON strings may hold.
    for line, text in enumerate(_decoded(path).split("\n"), start=1):
        if text.strip():
            try:
                yield line, _present(json.loads(text, object_pairs_hook=_object))
            except (ValueError, RecursionError) as error:
                where = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
                hint = "a JSONL file holds one JSON object a line"
                yield line, BadRowError(f"broken JSON: {getattr(error, 'msg', error)}{where}", hint=hint)


def _json(path: Path) -> Iterator[Record]:
    text = _decoded(path)
    first = text.lstrip().partition("\n")[0]
    if first.startswith("{") and _is_json(first):  # datasets and pandas write JSON lines to .json files too
        yield from _jsonl(path)
        return
    try:
        whole = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        where = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}{where}: broken JSON: {getattr(error, 'msg', error)}") from None
    if isinstance(whole, dict):  # a page of an API's answer, or one record alone
        whole = next((whole[name] for name in ("data", "runs") if isinstance(whole.get(name), list)), [whole])
    rows = whole if isinstance(whole, list) else [whole]
    yield from ((number, _present(row)) for number, row in enumerate(rows, start=1))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _csv(path: Path) -> Iterator[Record]:
    text = _decoded(path)
    heading = text.partition("\n")[0]
    # Prompts and conversations outgrow the module's 128 kB a cell; the limit is global to the process.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=heading.count), strict=True)
    number, header = 0, list[str]()
    try:
        for number, cells in enumerate(reader, start=1):
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                twice = [name for name in header if name and header.count(name) > 1]
                if twice:
                    raise DataError(f"{path}:{number}: the column {twice[0]!r} stands twice")
            elif len(cells) > len(header):
                count = f"the row has {len(cells)} cells, the header {len(header)}"
                yield number, BadRowError(count, hint="quote cells that hold the delimiter")
            else:
                yield number, _csv_fields(header, cells)
    except csv.Error as error:
        raise DataError(f"{path}:{number + 1}: broken CSV: {error}", hint="is a quote left open?") from None


def _csv_fields(header: Sequence[str], cells: Sequence[str]) -> Fields | BadRowError:
    fields: Fields = {name: cell for name, cell in zip(header, cells, strict=False) if name and cell}
    for name in {"prompt", "chosen", "rejected", "completion", "messages"} & fields.keys():
        if re.match(r"\s*\[\s*\{", fields[name]):
            try:
                fields[name] = json.loads(fields[name])
            except (ValueError, RecursionError):
                hint = "write such cells with json.dumps, not str"
                return BadRowError(f"{name!r} looks like messages and is not JSON: {short(fields[name])}", hint=hint)
    return fields


def _parquet(path: Path) -> Iterator[Record]:
    pyarrow, parquet = _extra("pyarrow", path), _extra("pyarrow.parquet", path)
    try:
        # Not read_table(): it makes columns of folders named like "a=b" on the way to the file.
        with parquet.ParquetFile(path) as file:
            table = file.read()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
    try:
        rows = table.to_pylist()
    except (ArithmeticError, ValueError, RecursionError):  # a value that Python can't hold: find the row
        rows = [_arrow_row(table, index) for index in range(table.num_rows)]
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, BadRowError) else _present(row)


def _arrow_row(table: Any, index: int) -> Fields | BadRowError:
    """Return a row of an Arrow table, value by value. A date that Python can't hold becomes text."""
    fields: Fields = {}
    for name in table.column_names:
        scalar = table[name][index]
        try:
            fields[name] = scalar.as_py()
        except UnicodeDecodeError as error:
            return BadRowError(f"{name!r} has byte {error.object[error.start]:#04x}, which is not UTF-8")
        except RecursionError:
            return _too_deep()
        except (ArithmeticError, ValueError):
            fields[name] = str(getattr(scalar, "value", None))
    return fields


# the files by which a folder of `Dataset.save_to_disk` and of `DatasetDict.save_to_disk` is known
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"


def _saved(folder: str, split: str) -> Iterator[Record]:
    datasets = _extra("datasets", folder)
    try:
        loaded = datasets.load_from_disk(folder)
    except Exception as error:  # arrow, json and file errors alike: the folder is damaged
        raise DataError(f"{folder} is not a readable folder of datasets: {error}") from error
    yield from _rows_of(loaded, folder, split)


def _hub(name: str, split: str) -> Iterator[Record]:
    datasets = _extra("datasets", name)
    try:
        loaded = datasets.load_dataset(name, split=split or None)
    except Exception as error:  # not found, gated, offline, no such split: a sentence each
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{name!r} is not a file here, and the Hub gave no data set of that name: {reason}",
            hint="name a file, a folder that `datasets` saved, or a Hub name such as org/name:train",
        ) from error
    yield from _rows_of(loaded, name, "")


def _rows_of(loaded: Any, name: str, split: str) -> Iterator[Record]:
    if isinstance(loaded, dict):  # splits by name
        wanted = split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
        if wanted not in loaded:
            raise DataError(f"{name!r} has no split {wanted!r}", hint=f"it has {', '.join(loaded)}; write {name}:split")
        loaded = loaded[wanted]
    elif split:
        raise DataError(f"{name!r} has no splits, so {split!r} can't be taken", hint=f"write {name} alone")
    yield from ((number, _present(row)) for number, row in enumerate(loaded, start=1))


def _extra(module: str, path: str | Path) -> Any:
    try:
        return importlib.import_module(module)  # by name, not by `import`: these libraries have no types
    except ImportError as error:
        raise MissingExtraError(
            f"reading {path} needs {module.partition('.')[0]}", hint="pip install 'mara-integrations[data]'"
        ) from error


def _present(row: Any) -> Fields | BadRowError:
    """Return the fields that are not null, at every depth: Arrow gives each object the fields of all rows."""
    if not isinstance(row, Mapping):
        return BadRowError(f"the row is {short(row)}", hint="a row is a JSON object")
    if is_too_deep(row):
        return _too_deep()
    fields: Fields = _without_nulls(row)
    return fields


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        kind = RepeatedKeys if isinstance(value, RepeatedKeys) else dict
        return kind({name: _without_nulls(item) for name, item in value.items() if item is not None})
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def is_too_deep(value: Any) -> bool:
    """Return whether objects and lists are nested more than `MAX_DEPTH` levels deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        nested: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                nested += item.values()
            elif isinstance(item, list | tuple):
                nested += item
        if not nested:
            return False
        level = nested
    return True


def _too_deep() -> BadRowError:
    return BadRowError(f"the row is nested more than {MAX_DEPTH} levels deep", hint="store the inner levels as text")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, marked where a key stands more than once."""
    fields = dict(pairs)
    return fields if len(fields) == len(pairs) else RepeatedKeys(fields)


def short(value: Any) -> str:
    """Return a value as text that is short enough for a message."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
