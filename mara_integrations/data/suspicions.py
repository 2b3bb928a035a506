"""Counts rows that are usable but probably mistakes, so that somebody looks at them."""

from __future__ import annotations

from collections.abc import Sequence

from mara_integrations.data.records import Record, RepeatedKeys
from mara_integrations.data.rows import Labelled, Pair, Row, canonical, prompt_key


def suspicions(records: Sequence[Record], rows: Sequence[Row]) -> list[str]:
    """Return a sentence about each kind of suspicious row, with their number and the first one.

    Args:
        records: Rows as they were read.
        rows: The rows that are used.
    """
    seen: set[str] = set()
    copies: list[Row] = []
    labels: dict[str, bool] = {}
    contradictions: list[Row] = []
    for row in rows:
        content = canonical(row)
        if content in seen:
            copies.append(row)
        seen.add(content)
        if (
            isinstance(row, Labelled)
            and labels.setdefault(f"{prompt_key(row)} {row.completion}", row.label) != row.label
        ):
            contradictions.append(row)
    equal = [row for row in rows if isinstance(row, Pair) and row.chosen.strip() == row.rejected.strip()]
    with_nul = [row for row in rows if any("\0" in text for text in _texts(row))]
    repeated = [line for line, record in records if isinstance(record, RepeatedKeys)]
    found = [
        _sentence(equal, "has the same text as chosen and as rejected", "have the same text as chosen and as rejected"),
        _sentence(copies, "is a copy of an earlier row", "are copies of earlier rows"),
        _sentence(contradictions, "labels the same reply otherwise", "label the same reply otherwise than before"),
        _sentence(with_nul, "has a NUL character", "have NUL characters"),
    ]
    if repeated:
        path = rows[0].source.rpartition(":")[0]
        found.append(
            f"{_rows(len(repeated), 'has a key that stands twice', 'have keys that stand twice')}, of which the last "
            f"value counts (first: {path}:{repeated[0]})"
        )
    return [sentence for sentence in found if sentence]


def _sentence(rows: Sequence[Row], singular: str, plural: str) -> str:
    return f"{_rows(len(rows), singular, plural)} (first: {rows[0].source})" if rows else ""


def _rows(count: int, singular: str, plural: str) -> str:
    return f"1 row {singular}" if count == 1 else f"{count} rows {plural}"


def _texts(row: Row) -> list[str]:
    texts = [message.content for message in row.prompt]
    if isinstance(row, Pair):
        texts += [row.chosen, row.rejected]
    elif isinstance(row, Labelled):
        texts.append(row.completion)
    return texts
