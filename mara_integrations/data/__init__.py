"""Reads prompts, preference pairs and labelled replies from any source into checked rows, and splits them by prompt.

Every row is checked before anything costly starts, and every error names the file and the line. Nothing here knows of
tokens, models or training.
"""

from mara_integrations.data.columns import column_mapping
from mara_integrations.data.near_copies import near_copies
from mara_integrations.data.preview import preview
from mara_integrations.data.reading import Format, prompts_of, read_dataset, read_prompts
from mara_integrations.data.rows import (
    Dataset,
    Form,
    Kind,
    Labelled,
    Pair,
    PromptRow,
    Row,
    gather_columns,
    prompt_row,
    split,
)

__all__ = [
    "Dataset",
    "Form",
    "Format",
    "Kind",
    "Labelled",
    "Pair",
    "PromptRow",
    "Row",
    "column_mapping",
    "gather_columns",
    "near_copies",
    "preview",
    "prompt_row",
    "prompts_of",
    "read_dataset",
    "read_prompts",
    "split",
]
