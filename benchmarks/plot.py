"""Plots of the tables that the other benchmarks write with `--json`: one picture a file, medians with their ranges.

python benchmarks/plot.py decode.json serve.json heads.json gpu.json [--output plots]
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from mara_integrations.errors import DataError, MissingExtraError

_Span = tuple[float, float, float]  # median, least, greatest
_ACROSS = 3  # panels beside each other
_QUANTITY = re.compile(r"tokens/s| in \w+$")  # in a panel's title: no ratio


def read_table(path: Path) -> dict[str, dict[str, _Span]]:
    """Rows and columns of a benchmark's json: its numbers, alone or as a median with a range.

    Raises:
        DataError: If there is no table in it.
    """
    content = json.loads(path.read_text())
    table = next((content[key] for key in ("rows", "heads", "medians") if key in content), None)
    if not isinstance(table, dict) or not table:
        raise DataError(f"{path} holds no table of a benchmark", hint="write one with --json")
    rows: dict[str, dict[str, _Span]] = {}
    for name, cells in table.items():
        cells = cells if isinstance(cells, dict) else {"ratio": cells}
        if "ratio" in cells and "range" in cells:  # one figure, others beside it
            cells = {"ratio": {"median": cells["ratio"], "range": cells["range"]}}
        rows[name] = {column: _span(cell) for column, cell in cells.items()}
    return rows


def _span(cell: Any) -> _Span:
    if isinstance(cell, dict):
        return (cell["median"], *cell["range"])
    return (cell, cell, cell)


def plot(path: Path, output: Path) -> Path:
    """Draw the table of one file, a panel for each column; returns the picture's path.

    Raises:
        MissingExtraError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("plots need matplotlib", hint="pip install 'mara-integrations[plots]'") from None
    rows = read_table(path)
    panels: dict[str, list[str]] = {}  # columns by what they are about, before the comma
    for column in dict.fromkeys(column for cells in rows.values() for column in cells):
        panels.setdefault(column.split(", ")[0], []).append(column)
    across = min(_ACROSS, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(1.6 + 2.9 * across, down * (1.1 + 0.3 * len(rows))), layout="constrained")
    grid = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for axes, (title, columns) in zip(grid, panels.items(), strict=False):
        for index, column in enumerate(columns):
            shift = 0.3 * (index - (len(columns) - 1) / 2)
            known = [(row + shift, *cells[column]) for row, cells in enumerate(rows.values()) if column in cells]
            places, medians, lows, highs = zip(*known, strict=True)
            spread = [[m - low for m, low in zip(medians, lows, strict=True)]]
            spread += [[high - m for m, high in zip(medians, highs, strict=True)]]
            label = column.removeprefix(title).lstrip(", ") or "whole"
            axes.errorbar(medians, places, xerr=spread, fmt="o", markersize=4, capsize=2, linewidth=1, label=label)
        if not _QUANTITY.search(title):
            axes.axvline(1.0, color="grey", linewidth=0.8, zorder=0)
        axes.set_xlim(left=0)
        axes.set_title(title, fontsize="medium")
        axes.grid(axis="y", linewidth=0.3)
        if len(columns) > 1:
            axes.legend(fontsize="x-small")
    grid[0].set_yticks(range(len(rows)), list(rows))
    grid[0].set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    for axes in grid[len(panels) :]:
        axes.axis("off")
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
