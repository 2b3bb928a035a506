"""Plots of the tables that the other benchmarks write with `--json`: one picture a file, bars with their ranges.

python benchmarks/plot.py decode.json serve.json heads.json gpu.json [--output plots]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mara_integrations.errors import DataError, MissingExtraError

_Bar = tuple[float, float, float]  # median, least, greatest


def read_table(path: Path) -> dict[str, dict[str, _Bar]]:
    """Rows and columns of a benchmark's json: its numbers, alone or as a median with a range.

    Raises:
        DataError: If there is no table in it.
    """
    content = json.loads(path.read_text())
    table = next((content[key] for key in ("rows", "heads", "medians") if key in content), None)
    if not isinstance(table, dict) or not table:
        raise DataError(f"{path} holds no table of a benchmark", hint="write one with --json")
    rows: dict[str, dict[str, _Bar]] = {}
    for name, cells in table.items():
        cells = cells if isinstance(cells, dict) else {"ratio": cells}
        if "ratio" in cells and "range" in cells:  # one figure, others beside it
            cells = {"ratio": {"median": cells["ratio"], "range": cells["range"]}}
        rows[name] = {column: _bar(cell) for column, cell in cells.items()}
    return rows


def _bar(cell: Any) -> _Bar:
    if isinstance(cell, dict):
        return (cell["median"], *cell["range"])
    return (cell, cell, cell)


def plot(path: Path, output: Path) -> Path:
    """Draw the table of one file, a group of bars for each row; returns the picture's path.

    Raises:
        MissingExtraError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("plots need matplotlib", hint="pip install 'mara-integrations[plots]'") from None
    rows = read_table(path)
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    figure = Figure(figsize=(8, 1.5 + 0.28 * len(rows) * (len(columns) + 1)), layout="constrained")
    axes = figure.subplots()
    thickness = 0.8 / len(columns)
    for index, column in enumerate(columns):
        places = [row + (index + 0.5) * thickness - 0.4 for row, cells in enumerate(rows.values()) if column in cells]
        bars = [cells[column] for cells in rows.values() if column in cells]
        medians = [median for median, _, _ in bars]
        spread = [[m - low for m, low, _ in bars], [high - m for m, _, high in bars]]
        axes.barh(places, medians, thickness, xerr=spread, label=column, error_kw={"capsize": 2})
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("ratio")
    axes.set_title(path.stem)
    axes.legend(fontsize="small")
    output.mkdir(parents=True, exist_ok=True)
    picture = output / f"{path.stem}.png"
    figure.savefig(picture, dpi=120)
    return picture


def main(arguments: list[str] | None = None) -> list[Path]:
    """Draw all files; returns the pictures' paths."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("plots"))
    args = parser.parse_args(arguments)
    pictures = [plot(path, args.output) for path in args.files]
    for picture in pictures:
        print(picture)
    return pictures


if __name__ == "__main__":
    main()
