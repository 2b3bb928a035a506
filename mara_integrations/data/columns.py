"""Columns with names of the user's own: where the fields of a row are, and which scores count as good."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mara_integrations.data.records import BadRowError, Fields, is_too_deep, short
from mara_integrations.errors import ConfigError

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
}


@dataclass(frozen=True, slots=True)
class Column:
    """The column of a field, or the path to a nested one, and the bound of a good score.

    Attributes:
        path: Name or names, as `question` or `inputs.question`.
        comparison: Comparison with the bound, as `>=`; None takes the value as it is.
        bound: Number that the value is compared with.
    """

    path: str
    comparison: str | None = None
    bound: float = 0.0

    def value_in(self, fields: Fields) -> Any:
        """Return the field's value, or whether it is good if there is a comparison; None where the row has none.

        Raises:
            BadRowError: If it is to be compared and is not a number.
        """
        found = self._found(fields)
        return found if found is None or self.comparison is None else self.is_good(found)

    def absent_from(self, fields: Fields) -> bool:
        """Return whether the row has no such field."""
        return self._found(fields) is None

    def is_good(self, score: Any) -> bool:
        """Return whether a score is good.

        Raises:
            BadRowError: If it is not a number.
        """
        assert self.comparison is not None, "only a column with a comparison has good scores"
        try:
            number = float(score)
            if math.isnan(number):
                raise ValueError
            return _COMPARISONS[self.comparison](number, self.bound)
        except (TypeError, ValueError, OverflowError):
            raise BadRowError(
                f"{self.path!r} is {short(score)}", hint=f"a number is needed for {self.comparison} {self.bound:g}"
            ) from None

    def _found(self, fields: Fields) -> Any:
        if self.path in fields:
            return fields[self.path]
        value: Any = fields
        for name in self.path.split("."):
            value = decoded(value)
            value = value.get(name) if isinstance(value, dict) else None
        return value


def column_mapping(texts: Iterable[str]) -> dict[str, str]:
    """Return columns by name, from the notation of a command line, `prompt=question`.

    Raises:
        ConfigError: If one has no equals sign.
    """
    pairs = [text.partition("=") for text in texts]
    for name, sign, _ in pairs:
        if not sign:
            raise ConfigError(f"column {name!r} is not a mapping", hint="for example prompt=question or label=stars>=4")
    return {name.strip(): path for name, _, path in pairs}


def parse_columns(given: Mapping[str, str]) -> dict[str, Column]:
    """Return columns by name, from the notation `{"prompt": "inputs.question", "label": "stars>=4"}`.

    Raises:
        ConfigError: If one is empty.
    """
    columns = {}
    for name, text in given.items():
        match = re.fullmatch(r"\s*(.+?)\s*(?:(>=|<=|>|<)\s*(-?[\d.]+)\s*)?", text)
        if not name or match is None:
            raise ConfigError(
                f"column {f'{name}={text}'!r} names no column", hint="for example prompt=question or label=stars>=4"
            )
        columns[name] = Column(match[1], match[2], float(match[3] or 0.0))
    return columns


def renamed(fields: Fields, columns: Mapping[str, Column]) -> Fields:
    """Return a row with its fields under the names of `columns`; an absent field stays absent."""
    taken = {name: value for name, column in columns.items() if (value := column.value_in(fields)) is not None}
    used = {column.path for column in columns.values()}
    return taken | {name: value for name, value in fields.items() if name not in used and name not in columns}


def decoded(value: Any) -> Any:
    """Return the value of JSON text, as cells of CSV and Parquet hold it; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return value if is_too_deep(found) else found
    return value
