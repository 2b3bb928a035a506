"""Shows data as the model will see it, for a look before training."""

from __future__ import annotations

from collections.abc import Callable

from mara_integrations.data.rows import Dataset, Labelled, Pair, Row

_KINDS = {"pairs": "preference pairs", "labelled": "labelled replies", "prompts": "prompts"}


def preview(dataset: Dataset, render: Callable[[Row], str], count: int = 2) -> tuple[str, list[str]]:
    """Describe a data set in a line, and return its first rows with the chat template applied.

    Args:
        dataset: Rows of any kind.
        render: Returns the text that the model gets for the prompt of a row.
        count: Number of rows to show.
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
