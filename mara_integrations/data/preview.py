"""Data as the model will see it, to be looked at before training."""

from __future__ import annotations

from collections.abc import Callable

from mara_integrations.data.rows import Dataset, Labelled, Pair, Row

_KINDS = {"pairs": "preference pairs", "labelled": "labelled replies", "prompts": "prompts"}


def preview(dataset: Dataset, render: Callable[[Row], str], count: int = 2) -> tuple[str, list[str]]:
    """What a data set was taken for, in a line, and its first rows with the chat template applied.

    Args:
        dataset: Any.
        render: Makes the model's text of a row's prompt.
        count: Rows to show.
    """
    tools = sum(bool(row.tools) for row in dataset.rows)
    line = f"{len(dataset)} {_KINDS[dataset.kind]}, {dataset.form}{f', {tools} with tools' if tools else ''}"
    samples = []
    for row in dataset.rows[:count]:
        prompt = render(row)
        if isinstance(row, Pair):
            replies = {"chosen": row.chosen, "rejected": row.rejected}
        elif isinstance(row, Labelled):
            replies = {"good" if row.label else "bad": row.completion}
        else:
            replies = {}
        samples.append("\n".join([prompt, *(f"  {name}: {text}" for name, text in replies.items())]))
    return line, samples
