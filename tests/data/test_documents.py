from __future__ import annotations

from typing import Any

import pytest

from mara_integrations.data import Dataset, PromptRow, read_dataset
from mara_integrations.data.documents import QUERY, TEMPLATE, has_documents, question_alone, with_documents
from mara_integrations.errors import DataError
from mara_integrations.messages import Message


def dataset(*rows: dict[str, Any]) -> Dataset:
    return read_dataset(list(rows))


def test_each_question_is_asked_with_its_documents_and_with_others() -> None:
    data = dataset(
        {"prompt": "When?", "context": "At {query_str}.", "answer": "nine"},
        {"prompt": "Where?", "documents": ["Here.", " There. "]},
    )

    found = with_documents(data, "Read {context_str}, then: {query_str}")

    assert [row.prompt[0].content for row in found.rows] == [
        "Read At {query_str}., then: When?", "Read Here.\n\nThere., then: When?",
        "Read Here.\n\nThere., then: Where?", "Read At {query_str}., then: Where?",
    ]  # fmt: skip
    rows = [row for row in found.rows if isinstance(row, PromptRow)]
    assert [row.columns["answerable"] for row in rows] == [True, False, True, False]
    assert rows[0].columns["answer"] == "nine" and rows[1].columns["context"] == "Here.\n\nThere."
    assert [question_alone(row)[0].content for row in rows] == ["When?", "When?", "Where?", "Where?"]
    assert found.fingerprint != data.fingerprint


def test_other_documents_are_those_of_no_row_with_the_same_question() -> None:
    data = dataset(
        {"prompt": "When?", "context": "At nine."}, {"prompt": "when? ", "context": "At ten."},
        {"prompt": "Where?", "context": "Here."},
    )  # fmt: skip

    wrong = [row.columns["context"] for row in with_documents(data).rows if not row.columns["answerable"]]  # type: ignore[union-attr]

    assert wrong[:2] == ["Here.", "Here."] and wrong[2] in ("At nine.", "At ten.")


def test_other_documents_are_drawn_among_all_rows_and_always_the_same() -> None:
    data = dataset(*({"prompt": f"{i}?", "context": f"{i}!"} for i in range(60)))

    found = with_documents(data)

    wrong = [int(row.columns["context"][:-1]) for row in found.rows if not row.columns["answerable"]]  # type: ignore[union-attr]
    assert sorted(wrong) == list(range(60)) and all(number != i for i, number in enumerate(wrong))
    assert len({(number - i) % 60 for i, number in enumerate(wrong)}) > 20
    assert found == with_documents(data)


@pytest.mark.parametrize("flag", [False, "false", " False"])
def test_a_question_that_its_documents_do_not_answer_is_asked_once(flag: object) -> None:
    data = dataset(
        {"prompt": "When?", "context": "Here.", "answerable": flag},
        {"prompt": "Where?", "context": "Here."},
        {"prompt": "Who?", "context": "He.", "answerable": True},
    )

    rows = [row.columns for row in with_documents(data).rows]  # type: ignore[union-attr]

    assert [(row["question"], row["context"], row["answerable"]) for row in rows] == [
        ("When?", "Here.", False),
        ("Where?", "Here.", True), ("Where?", "He.", False),
        ("Who?", "He.", True), ("Who?", "Here.", False),
    ]  # fmt: skip


def test_a_flag_that_is_neither_true_nor_false_is_refused() -> None:
    with pytest.raises(DataError, match="answerable is 'maybe'"):
        with_documents(dataset({"prompt": "A?", "context": "B", "answerable": "maybe"}))


def test_the_prompt_is_that_of_a_query_engine() -> None:
    from llama_index.core.prompts.default_prompts import DEFAULT_TEXT_QA_PROMPT

    assert DEFAULT_TEXT_QA_PROMPT.format(context_str="C", query_str="Q") == TEMPLATE.replace(
        "{context_str}", "C"
    ).replace(QUERY, "Q")


def test_the_question_is_the_last_message() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    rows = [{"prompt": [*turns, {"role": "user", "content": ask}], "context": ask * 2} for ask in ("A?", "B?")]

    row = with_documents(dataset(*rows), "{context_str} {query_str}").rows[0]

    assert isinstance(row, PromptRow) and row.prompt[-1] == Message("user", "A?A? A?")
    assert question_alone(row) == (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "A?"))


def test_only_prompts_that_all_have_documents_are_questions_with_documents() -> None:
    assert has_documents(dataset({"prompt": "A?", "context": "B"}))
    assert not has_documents(dataset({"prompt": "A?", "context": "B"}, {"prompt": "C?"}))
    assert not has_documents(dataset({"prompt": "A?", "chosen": "B", "rejected": "C", "context": "D"}))


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        (("B", "B"), "have the same documents"),
        (("B", 3), "the documents are 3"),
        (("B", ["a", 1]), "the documents are"),
        (("B", " "), "the documents are empty"),
    ],
)
def test_documents_that_can_not_be_used_are_refused(contexts: tuple[Any, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        with_documents(dataset(*({"prompt": f"{i}?", "context": text} for i, text in enumerate(contexts))))
