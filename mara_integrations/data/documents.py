"""Questions with documents: prompts that hold both, and questions asked with documents that do not hold the answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from mara_integrations.data.rows import Dataset, PromptRow, prompt_key, prompt_row
from mara_integrations.errors import DataError
from mara_integrations.messages import Message

COLUMNS = ("context", "documents")
CONTEXT, QUERY = "{context_str}", "{query_str}"
# Source: LlamaIndex, DEFAULT_TEXT_QA_PROMPT, so that a query engine's prompts are those that were trained on.
TEMPLATE = (
    "Context information is below.\n"
    "---------------------\n"
    f"{CONTEXT}\n"
    "---------------------\n"
    "Given the context information and not prior knowledge, answer the query.\n"
    f"Query: {QUERY}\n"
    "Answer: "
)
# What a head for documents is to learn, in the words of a system prompt.
GROUNDED = (
    "Answer from the given documents only. "
    "If the documents do not hold the answer, say that it is not in the documents."
)


def is_template(text: str) -> bool:
    """Return whether a text has one place for the documents, and at least one for the question."""
    return text.count(CONTEXT) == 1 and QUERY in text


def has_documents(data: Dataset) -> bool:
    """Return whether each row is a question with documents, in a column `context` or `documents`."""
    return data.kind == "prompts" and all(_given(prompt_row(row)) is not None for row in data.rows)


def with_documents(data: Dataset, template: str | None = None) -> Dataset:
    """Return two prompts for each question: with its own documents, and with those of another row, drawn at random.

    Columns of the prompts are those of the row, and `question`, `context` (the documents as text) and `answerable`,
    which is false with the documents of another row. That these do not hold the answer is taken for granted. A row
    whose own column `answerable` is false is asked once, with the documents that it has.

    Args:
        data: Questions with documents, see `has_documents`. The last message of a row is the question.
        template: Text of the prompt, with `{context_str}` and `{query_str}`; None is LlamaIndex's own.

    Raises:
        DataError: If the documents of a row are not text, all rows have the same, or `answerable` is neither true nor
            false.
    """
    rows = [prompt_row(row) for row in data.rows]
    texts = [_text(row) for row in rows]
    own: dict[str, set[str]] = {}  # all documents that a question is asked with
    for row, text in zip(rows, texts, strict=True):
        own.setdefault(prompt_key(row), set()).add(text)
    order = random.Random(len(rows)).sample(range(len(rows)), len(rows))
    place_of = {number: place for place, number in enumerate(order)}
    found: list[PromptRow] = []
    for number, row in enumerate(rows):
        if not _is_answerable(row):
            found.append(_filled(row, texts[number], False, template or TEMPLATE))
            continue
        place = place_of[number]
        others = (texts[n] for n in order[place + 1 :] + order[:place] if texts[n] not in own[prompt_key(row)])
        other = next(others, None)
        if other is None:
            raise DataError(
                f"{data.path}: all {len(rows)} questions of one side have the same documents, so none can be asked "
                "with others",
                hint="give more questions, on several documents",
            )
        found += [
            _filled(row, context, is_answerable, template or TEMPLATE)
            for context, is_answerable in ((texts[number], True), (other, False))
        ]
    return replace(data, rows=tuple(found))


def question_alone(row: PromptRow) -> tuple[Message, ...]:
    """Return the messages of a row of `with_documents` as they were, without documents."""
    return (*row.prompt[:-1], Message(row.prompt[-1].role, str(row.columns["question"])))


def _filled(row: PromptRow, context: str, is_answerable: bool, template: str) -> PromptRow:
    *earlier, last = row.prompt
    before, _, after = template.partition(CONTEXT)  # what stands in a document is never filled in
    text = f"{before.replace(QUERY, last.content)}{context}{after.replace(QUERY, last.content)}"
    columns = {**row.columns, "question": last.content, "context": context, "answerable": is_answerable}
    return replace(row, prompt=(*earlier, Message(last.role, text)), columns=columns)


def _is_answerable(row: PromptRow) -> bool:
    """Return whether a row's documents are to hold the answer: they are, unless its own column says otherwise."""
    given = row.columns.get("answerable")
    if given is None or isinstance(given, bool):
        return given is not False
    if str(given).strip().casefold() not in ("true", "false"):  # as a table of text has it
        raise DataError(f"{row.source}: answerable is {given!r:.60}", hint="true or false")
    return str(given).strip().casefold() == "true"


def _given(row: PromptRow) -> object:
    return next((row.columns[name] for name in COLUMNS if row.columns.get(name) is not None), None)


def _text(row: PromptRow) -> str:
    given = _given(row)
    parts = [given] if isinstance(given, str) else given
    if not isinstance(parts, Sequence) or not all(isinstance(part, str) for part in parts):
        raise DataError(f"{row.source}: the documents are {given!r:.60}", hint="a text, or a list of texts")
    text = "\n\n".join(part.strip() for part in parts).strip()
    if not text:
        raise DataError(f"{row.source}: the documents are empty", hint="leave the row out")
    return text
