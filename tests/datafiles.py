"""What tests of data share: rows, and files of every format."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mara_integrations.data import (
    read_dataset,
)
from mara_integrations.errors import DataError
from mara_integrations.messages import Message

PAIR = {"prompt": "What colour is the sky?", "chosen": "It is blue.", "rejected": "It is green."}
LABELLED = {"prompt": "What colour is the sky?", "completion": "It is blue.", "label": True}

SKY = (Message("user", "What colour is the sky?"),)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: json.dumps(cell) if isinstance(cell, list) else cell for key, cell in row.items()})
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="reading Parquet needs the data extra")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


WRITERS: dict[str, Callable[[Path, list[Any]], Path]] = {
    "rows.jsonl": write_jsonl,
    "rows.json": write_json,
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
}


def error_of(path: Path, kind: Any = "auto") -> DataError:
    with pytest.raises(DataError) as caught:
        read_dataset(path, kind)
    return caught.value
