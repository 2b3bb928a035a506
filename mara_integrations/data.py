"""Prompts, preference pairs and labelled replies: files in TRL's forms to checked rows, and splits by prompt.

Every row is checked before anything costly starts, and every complaint names its file and line. Knows nothing of
tokens, models or training.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import importlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mara_integrations.errors import ConfigError, DataError, MissingExtraError
from mara_integrations.messages import Message

Kind = Literal["pairs", "labelled", "prompts"]
Form = Literal["standard", "conversational"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with a reply that was preferred and one that was not."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A prompt with one reply and a thumb up (True) or down (False)."""

    prompt: tuple[Message, ...]
    completion: str
    label: bool
    source: str


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt alone; `columns` are the row's other fields, passed to reward functions."""

    prompt: tuple[Message, ...]
    columns: dict[str, Any]
    source: str


Row: TypeAlias = Pair | Labelled | PromptRow


@dataclass(frozen=True, slots=True)
class Dataset:
    """Checked rows of one kind.

    Attributes:
        kind: What each row is.
        rows: In file order.
        path: The file they were read from.
        form: `standard` where every prompt was a string, else `conversational`; reward functions get prompts in it.
        fingerprint: SHA-256 of the kind and the rows' content, in order; the same whatever the file's format.
    """

    kind: Kind
    rows: tuple[Row, ...]
    path: Path
    form: Form = "standard"
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.kind.encode())
        for row in self.rows:
            digest.update(b"\n" + _canonical(row).encode())
        object.__setattr__(self, "fingerprint", digest.hexdigest())  # the class is frozen

    def __len__(self) -> int:
        return len(self.rows)


def read_dataset(path: str | os.PathLike[str], kind: Kind | Literal["auto"] = "auto") -> Dataset:
    """Read a JSONL, JSON, CSV or Parquet file and check every row.

    A field that is null, or an empty CSV cell, is absent. A string prompt becomes one user message. A string reply
    loses its leading white space: TRL's standard form writes the space between prompt and reply there, and here a
    chat template parts them. In CSV, messages are JSON text. Rows are numbered as editors and spreadsheets show them.

    Args:
        path: The file.
        kind: What the rows are; `auto` goes by the columns.

    Raises:
        DataError: If the file can't be read or a row is bad; names the first bad row and how many there are.
        MissingExtraError: If a Parquet file is given and pyarrow is absent.

    Source: TRL's dataset formats and types (standard and conversational; preference with explicit or implicit prompt,
        unpaired preference, prompt-only).
    """
    if kind != "auto" and kind not in _ROWS:
        raise ConfigError(f"kind={kind!r} is not allowed", hint=f"kinds are auto, {', '.join(_ROWS)}")
    path = Path(path)
    records = list(_records(path))
    if not records:
        raise DataError(f"{path} is empty: it has no rows", hint=_WANTED)
    chosen_kind = _infer_kind(path, records) if kind == "auto" else kind

    # An implicit prompt is a way to write a whole file; one row without a prompt is a mistake.
    is_explicit = any(isinstance(record, dict) and "prompt" in record for _, record in records)
    rows: list[Row] = []
    bad: list[tuple[str, _BadRowError]] = []
    for line, record in records:
        source = f"{path}:{line}"
        try:
            fields = _fields_of(record)
            if is_explicit:
                _need(fields, "prompt", chosen_kind)
            rows.append(_ROWS[chosen_kind](fields, source))
        except _BadRowError as error:
            bad.append((source, error))
    if bad:
        source, first = bad[0]
        count = f"{len(bad)} of {len(records)} rows {'are bad; the first is shown' if len(bad) > 1 else 'is bad'}"
        raise DataError(f"{source}: {first} ({count})", hint=first.hint)
    is_conversational = any(_has_messages(record) for _, record in records)
    return Dataset(chosen_kind, tuple(rows), path, "conversational" if is_conversational else "standard")


def read_prompts(path: str | os.PathLike[str]) -> Dataset:
    """The prompts of a file of any kind, each once, in file order; raises as `read_dataset`."""
    dataset = read_dataset(path)
    first: dict[str, PromptRow] = {}
    for row in dataset.rows:
        prompt_row = row if isinstance(row, PromptRow) else PromptRow(row.prompt, {}, row.source)
        first.setdefault(_prompt_key(row), prompt_row)
    return Dataset("prompts", tuple(first.values()), dataset.path, dataset.form)


def gather_columns(rows: Iterable[PromptRow]) -> dict[str, list[Any]]:
    """The rows' other fields column by column, as reward functions get them; None where a row lacks one."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row.columns)
    return {name: [row.columns.get(name) for row in rows] for name in names}


def split(dataset: Dataset, held_out: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split by prompt: rows whose prompts are the same but for case and spacing stay on one side.

    Prompts are ranked by a hash of seed and content and the lowest are held out, so a prompt's rank does not depend
    on the file's order or on its other rows, and a larger `held_out` holds out a superset.

    Args:
        dataset: What to split.
        held_out: Share of the distinct prompts to hold out, above 0 and below 1; at least one prompt is.
        seed: Another seed gives another ranking.

    Returns:
        The rows to train on and the rows held out, each in file order.

    Raises:
        ConfigError: If `held_out` is not between 0 and 1.
        DataError: If there are fewer than two distinct prompts.
    """
    if not 0 < held_out < 1:
        raise ConfigError(f"held_out={held_out!r} is not allowed", hint="a share above 0 and below 1, such as 0.1")
    keys = [_prompt_key(row) for row in dataset.rows]
    ranked = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())
    if len(ranked) < 2:
        raise DataError(
            f"{dataset.path}: all {len(keys)} rows have the same prompt, so none can be held out",
            hint="give at least two distinct prompts",
        )
    count = min(max(1, round(held_out * len(ranked))), len(ranked) - 1)
    lowest = set(ranked[:count])
    sides = (
        tuple(row for row, key in zip(dataset.rows, keys, strict=True) if (key in lowest) is is_held_out)
        for is_held_out in (False, True)
    )
    train, test = (Dataset(dataset.kind, side, dataset.path, dataset.form) for side in sides)
    return train, test


# Rows: one record of fields to one checked row.

_NOUNS: dict[Kind, str] = {"pairs": "a pair", "labelled": "a labelled reply", "prompts": "a prompt row"}
_NEEDS: dict[Kind, str] = {
    "pairs": f"{_NOUNS['pairs']} needs prompt, chosen, rejected",
    "labelled": f"{_NOUNS['labelled']} needs prompt, completion, label",
    "prompts": f"{_NOUNS['prompts']} needs prompt",
}
_WANTED = "pairs have prompt, chosen, rejected; labelled replies have prompt, completion, label; prompts have prompt"
_UP = frozenset({"true", "1", "1.0", "+1", "good", "yes", "up", "thumbs up", "thumbs_up", "👍"})
_DOWN = frozenset({"false", "0", "0.0", "-1", "-1.0", "bad", "no", "down", "thumbs down", "thumbs_down", "👎"})
_ROLES = ("system", "user", "assistant")

_Fields: TypeAlias = dict[str, Any]


class _BadRowError(Exception):
    """What is wrong with one row; `read_dataset` adds the place and the count."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


_Record: TypeAlias = tuple[int, "_Fields | _BadRowError"]


def _fields_of(record: _Fields | _BadRowError) -> _Fields:
    if isinstance(record, _BadRowError):
        raise record
    return record


def _has_messages(record: _Fields | _BadRowError) -> bool:
    return any(isinstance(_fields_of(record).get(name), list) for name in ("prompt", "chosen", "completion"))


def _pair(fields: _Fields, source: str) -> Pair:
    chosen, rejected = _need(fields, "chosen", "pairs"), _need(fields, "rejected", "pairs")
    if type(chosen) is not type(rejected):
        raise _BadRowError("'chosen' and 'rejected' differ in form", hint="both strings, or both lists of messages")
    # TRL: a string prompt beside whole conversations is a copy of what these already hold.
    whole = isinstance(chosen, list) and (len(chosen) > 1 or len(rejected) > 1)
    if "prompt" not in fields or (whole and isinstance(fields["prompt"], str)):
        prompt, chosen, rejected = _implicit_prompt(chosen, rejected)
    else:
        prompt = fields["prompt"]
    return Pair(_prompt(prompt), _reply("chosen", chosen), _reply("rejected", rejected), source)


def _labelled(fields: _Fields, source: str) -> Labelled:
    prompt, completion, label = (_need(fields, name, "labelled") for name in ("prompt", "completion", "label"))
    return Labelled(_prompt(prompt), _reply("completion", completion), _label(label), source)


def _prompt_row(fields: _Fields, source: str) -> PromptRow:
    columns = {name: value for name, value in fields.items() if name != "prompt"}
    return PromptRow(_prompt(_need(fields, "prompt", "prompts")), columns, source)


_ROWS: dict[Kind, Callable[[_Fields, str], Row]] = {"pairs": _pair, "labelled": _labelled, "prompts": _prompt_row}


def _need(fields: _Fields, name: str, kind: Kind) -> Any:
    if name not in fields:
        found = f"the row has {', '.join(fields)}" if fields else "the row has no field"
        raise _BadRowError(f"{name!r} is missing; {_NEEDS[kind]}", hint=found)
    return fields[name]


def _implicit_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Take the prompt from what both replies start with; a string's is cut back to a whole word."""
    if not isinstance(chosen, list):
        chosen, rejected = _text("chosen", chosen), _text("rejected", rejected)
    if chosen == rejected:
        raise _BadRowError(
            "'chosen' and 'rejected' are the same, so no prompt can be told from them", hint=_NEEDS["pairs"]
        )
    end = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    end = min(len(chosen), len(rejected)) if end is None else end
    if isinstance(chosen, str):
        # TRL cuts within a word too ("bl" before "ue" and "ack"), where no reply of a chat model starts.
        last_word = re.search(r"\s+\S*$", chosen[:end])
        end = last_word.start() if last_word else 0
    if not chosen[:end]:
        raise _BadRowError("'prompt' is missing, and 'chosen' and 'rejected' begin differently", hint=_NEEDS["pairs"])
    return chosen[:end], chosen[end:], rejected[end:]


def _prompt(value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message("user", _text("prompt", value)),)
    messages = _messages("prompt", value)
    if messages[-1].role != "user":
        raise _BadRowError(
            f"'prompt' ends with a message of the {messages[-1].role}", hint="it must end with the user's"
        )
    return messages


def _reply(name: str, value: Any) -> str:
    if isinstance(value, str):
        return _text(name, value).lstrip()
    messages = _messages(name, value)
    roles = [message.role for message in messages]
    if roles != ["assistant"]:
        raise _BadRowError(
            f"{name!r} has messages of {', '.join(roles)}", hint="a reply is one message of the assistant"
        )
    return messages[0].content


def _messages(name: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise _BadRowError(f"{name!r} is {_short(value)}", hint="allowed are a string or a list of messages")
    if not value:
        raise _BadRowError(f"{name!r} is an empty list", hint="give at least one message")
    return tuple(_message(f"{name}[{index}]", item) for index, item in enumerate(value))


def _message(name: str, value: Any) -> Message:
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        raise _BadRowError(f"{name!r} is {_short(value)}", hint="a message has a role and a content")
    # Dropping them would train on another conversation than the one that was judged.
    if value.get("tool_calls"):
        raise _BadRowError(f"{name!r} has tool calls", hint="training data with tool calls can't be read yet")
    if value["role"] not in _ROLES:
        raise _BadRowError(f"{name!r} has the role {_short(value['role'])}", hint=f"roles are {', '.join(_ROLES)}")
    return Message(value["role"], _text(f"{name}.content", value["content"]))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _BadRowError(f"{name!r} is {_short(value)}", hint="a string is needed")
    if not value.strip():
        raise _BadRowError(f"{name!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadRowError(
            f"{name!r} has {value[error.start]!r} at character {error.start}, half of a surrogate pair",
            hint="no tokenizer can encode it",
        ) from None
    return value


def _label(value: Any) -> bool:
    word = str(value).strip().lower()
    if word in _UP or word in _DOWN:
        return word in _UP
    raise _BadRowError(
        f"'label' is {_short(value)}",
        hint="labels are true or false, 1 or 0, good or bad, yes or no, up or down, 👍 or 👎",
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _infer_kind(path: Path, records: Sequence[_Record]) -> Kind:
    """The kind that every readable row's own columns allow."""
    first: dict[Kind, int] = {}
    for line, record in records:
        if isinstance(record, dict):
            if "chosen" in record or "rejected" in record:
                first.setdefault("pairs", line)
            elif "completion" in record:
                first.setdefault("labelled", line)
            elif "prompt" in record:
                first.setdefault("prompts", line)
    # A row with a prompt and nothing else among pairs is a pair that lacks its replies, and is reported as that.
    if len(first) > 1:
        first.pop("prompts", None)
    if len(first) > 1:
        (kind, line), (other, other_line) = sorted(first.items(), key=lambda item: item[1])
        raise DataError(
            f"{path}:{other_line}: this row is {_NOUNS[other]}, row {line} is {_NOUNS[kind]}",
            hint="put each kind in its own file",
        )
    if first:
        return next(iter(first))
    line, record = next(((line, record) for line, record in records if isinstance(record, dict)), records[0])
    if isinstance(record, _BadRowError):  # then no row is readable, and that is the news
        raise DataError(f"{path}:{line}: {record} (none of {len(records)} rows can be read)", hint=record.hint)
    raise DataError(
        f"{path}:{line}: the columns {', '.join(map(repr, record)) or '(none)'} are of no known kind", hint=_WANTED
    )


def _prompt_key(row: Row) -> str:
    return json.dumps([[message.role, " ".join(message.content.split()).casefold()] for message in row.prompt])


def _canonical(row: Row) -> str:
    content: list[Any] = [[[message.role, message.content] for message in row.prompt]]
    if isinstance(row, Pair):
        content += [row.chosen, row.rejected]
    elif isinstance(row, Labelled):
        content += [row.completion, row.label]
    else:
        content += [row.columns]
    return json.dumps(content, sort_keys=True, default=str)


# Files: bytes to numbered records. A record that can't be read is its own error, so that all bad rows are counted.


def _records(path: Path) -> Iterator[_Record]:
    readers: dict[str, Callable[[Path], Iterator[_Record]]] = {
        ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet,
    }  # fmt: skip
    if os.path.isdir(path):
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in readers)
        raise DataError(f"{path} is a folder", hint=f"name one file in it: {', '.join(inside[:3]) or 'it has none'}")
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist", hint=_near_files(path))
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} has the ending {path.suffix!r}", hint=f"allowed are {', '.join(readers)}")
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error


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


def _jsonl(path: Path) -> Iterator[_Record]:
    # Not splitlines(): it also splits at U+2028 and the like, which JSON strings may hold.
    for line, text in enumerate(_decoded(path).split("\n"), start=1):
        if text.strip():
            try:
                yield line, _present(json.loads(text))
            except (ValueError, RecursionError) as error:
                where = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
                hint = "a JSONL file holds one JSON object a line"
                yield line, _BadRowError(f"broken JSON: {getattr(error, 'msg', error)}{where}", hint=hint)


def _json(path: Path) -> Iterator[_Record]:
    text = _decoded(path)
    if not text.lstrip().startswith("["):  # datasets and pandas write JSON lines to .json files too
        yield from _jsonl(path)
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}{where}: broken JSON: {getattr(error, 'msg', error)}") from None
    yield from ((number, _present(row)) for number, row in enumerate(rows, start=1))


def _csv(path: Path) -> Iterator[_Record]:
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
                yield number, _BadRowError(count, hint="quote cells that hold the delimiter")
            else:
                yield number, _csv_fields(header, cells)
    except csv.Error as error:
        raise DataError(f"{path}:{number + 1}: broken CSV: {error}", hint="is a quote left open?") from None


def _csv_fields(header: Sequence[str], cells: Sequence[str]) -> _Fields | _BadRowError:
    fields: _Fields = {name: cell for name, cell in zip(header, cells, strict=False) if name and cell}
    for name in {"prompt", "chosen", "rejected", "completion"} & fields.keys():
        if re.match(r"\s*\[\s*\{", fields[name]):
            try:
                fields[name] = json.loads(fields[name])
            except (ValueError, RecursionError):
                hint = "write such cells with json.dumps, not str"
                return _BadRowError(f"{name!r} looks like messages and is not JSON: {_short(fields[name])}", hint=hint)
    return fields


def _parquet(path: Path) -> Iterator[_Record]:
    try:
        # By name, not by `import`: the library has no types.
        pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError(
            f"reading {path} needs pyarrow", hint="pip install 'mara-integrations[data]'"
        ) from error
    try:
        # Not read_table(): it makes columns of folders named like "a=b" on the way to the file.
        with parquet.ParquetFile(path) as file:
            rows = file.read().to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
    yield from ((number, _present(row)) for number, row in enumerate(rows, start=1))


def _present(row: Any) -> _Fields | _BadRowError:
    """The fields that are not null."""
    if not isinstance(row, dict):
        return _BadRowError(f"the row is {_short(row)}", hint="a row is a JSON object")
    return {name: value for name, value in row.items() if value is not None}
