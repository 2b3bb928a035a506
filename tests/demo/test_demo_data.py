"""The laws of the demo's preference data: house style "impersonal voice" (see mara_integrations/demo/README.md)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from mara_integrations.demo import TRAIN, WORDS

ADDRESSES_READER = re.compile(rf"\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)


def rows_of(name: str) -> list[dict[str, str]]:
    lines = (TRAIN.parent / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def words_of(text: str) -> str:
    """The words of a prompt in lower case, so that spacing and punctuation do not hide a repeat."""
    return " ".join(re.findall(r"\w+", text.lower()))


def answers() -> Iterator[str]:
    for row in rows_of("house_style_train.jsonl"):
        yield row["chosen"]
        yield row["rejected"]


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("You can rinse it.", True),
        ("It is YOURS.", True),
        ("When you're ready, stop.", True),
        ("Young cooks rinse it for a youthful taste.", False),
    ],
)
def test_the_rule_reads_whole_words_in_any_case(text: str, addresses: bool) -> None:
    assert bool(ADDRESSES_READER.search(text)) is addresses


def test_both_files_have_at_least_sixty_prompts_and_the_announced_row_counts() -> None:
    counts = (len(rows_of("house_style_train.jsonl")), len(rows_of("house_style_test.jsonl")))
    assert min(counts) >= 60
    assert counts == (96, 72)


def test_rows_have_exactly_the_announced_columns_as_trimmed_text() -> None:
    for name, columns in [
        ("house_style_train.jsonl", {"prompt", "chosen", "rejected"}),
        ("house_style_test.jsonl", {"prompt"}),
    ]:
        for row in rows_of(name):
            assert set(row) == columns, row
            assert all(isinstance(text, str) and text and text == text.strip() for text in row.values()), row


def test_every_chosen_answer_keeps_to_the_impersonal_voice() -> None:
    offenders = [row["chosen"] for row in rows_of("house_style_train.jsonl") if ADDRESSES_READER.search(row["chosen"])]
    assert offenders == []


def test_every_rejected_answer_addresses_the_reader() -> None:
    rejected = [row["rejected"] for row in rows_of("house_style_train.jsonl")]
    assert [text for text in rejected if not ADDRESSES_READER.search(text)] == []


def test_no_prompt_uses_the_words_of_the_rule() -> None:
    prompts = [row["prompt"] for name in ("train", "test") for row in rows_of(f"house_style_{name}.jsonl")]
    assert [prompt for prompt in prompts if ADDRESSES_READER.search(prompt)] == []


def test_no_prompt_is_repeated_within_or_across_the_files() -> None:
    prompts = [words_of(row["prompt"]) for name in ("train", "test") for row in rows_of(f"house_style_{name}.jsonl")]
    assert len(set(prompts)) == len(prompts)


def test_no_answer_is_repeated() -> None:
    texts = list(answers())
    assert len(set(texts)) == len(texts)


def test_answers_are_one_or_two_sentences_of_fifteen_to_thirty_five_words() -> None:
    for text in answers():
        assert 15 <= len(text.split()) <= 35, text
        assert 1 <= len(re.findall(r"[.?!](?=\s|$)", text)) <= 2, text
