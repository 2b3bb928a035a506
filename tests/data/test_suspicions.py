"""Rows that are probably mistakes, or nested too deep, or of odd types: said aloud, with file and row."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from mara_integrations.data import PromptRow, near_copies, read_dataset
from mara_integrations.errors import DataError
from mara_integrations.messages import Message

PAIR = {"prompt": "What colour is the sky?", "chosen": "It is blue.", "rejected": "It is green."}
LABELLED = {"prompt": "What colour is the sky?", "completion": "It is blue.", "label": True}


def write(path: Path, *rows: Any) -> Path:
    texts = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8", errors="surrogatepass")
    return path


class TestSuspiciousRows:
    def test_equal_replies_and_copies_are_counted(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", PAIR, {**PAIR, "rejected": "It is blue. "}, PAIR, PAIR)
        notes = read_dataset(path).notes
        assert notes == (
            f"1 row has the same text as chosen and as rejected (first: {path}:2)",
            f"2 rows are copies of earlier rows (first: {path}:3)",
        )

    def test_labels_that_contradict_each_other_are_counted(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", LABELLED, {**LABELLED, "label": False})
        assert f"1 row labels the same reply otherwise (first: {path}:2)" in read_dataset(path).notes

    def test_repeated_keys_are_counted_and_the_last_one_counts(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", PAIR, '{"prompt": "A?", "prompt": "B?", "chosen": "a", "rejected": "b"}')
        dataset = read_dataset(path)
        assert dataset.rows[1].prompt[0].content == "B?"
        said = f"1 row has a key that stands twice, of which the last value counts (first: {path}:2)"
        assert said in dataset.notes

    def test_nul_characters_are_counted(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", PAIR, {**PAIR, "chosen": "It is\0blue."})
        assert f"1 row has a NUL character (first: {path}:2)" in read_dataset(path).notes

    def test_ordinary_rows_are_not_mentioned(self, tmp_path: Path) -> None:
        rows = ({**PAIR, "prompt": f"{i}?"} for i in range(5))
        assert read_dataset(write(tmp_path / "a.jsonl", *rows)).notes == ()


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


class TestOddValues:
    @pytest.mark.parametrize("depth", [150, 3_000, 100_000])
    @pytest.mark.parametrize(
        "row",
        [
            '{"prompt": "A?", "tools": %s}',
            '{"prompt": "A?", "other": %s}',
            '{"prompt": "A?", "tools": "%s"}',
            '{"prompt": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "%s"}]}, '
            '{"role": "tool", "content": "1"}]}',
        ],
        ids=["tools", "another column", "tools as text", "arguments as text"],
    )
    def test_deep_values_are_bad_rows(self, tmp_path: Path, row: str, depth: int) -> None:
        path = write(tmp_path / "a.jsonl", {"prompt": "B?"}, row % nested(depth))
        with pytest.raises(DataError, match=rf"{path}:2: .*(nested|broken JSON|not JSON)"):
            read_dataset(path)
        assert len(read_dataset(path, skip_bad_rows=True)) == 1

    @pytest.mark.parametrize(
        ("messages", "said"),
        [
            ([{"role": "tool", "content": "x", "tool_call_id": ["a"]}], r"tool_call_id' is \['a'\]"),
            ([{"role": "tool", "content": "x", "name": {"a": 1}}], "name' is {'a': 1}"),
            (
                [
                    {"role": "assistant", "tool_calls": [{"id": "\ud800", "name": "f"}]},
                    {"role": "tool", "content": "x", "tool_call_id": "1"},
                ],
                "half of a surrogate pair",
            ),
        ],
    )
    def test_odd_types_and_half_characters_in_messages_are_bad_rows(
        self, tmp_path: Path, messages: list[Any], said: str
    ) -> None:
        path = write(tmp_path / "a.jsonl", {"prompt": "B?"}, {"prompt": messages})
        with pytest.raises(DataError, match=rf"{path}:2: .*{said}"):
            read_dataset(path)

    @pytest.mark.parametrize(
        ("tool", "said"),
        [
            ({"name": "f\ud800"}, "half of a surrogate pair"),
            ({"name": "f", "description": ["x"]}, r"description' is \['x'\]"),
            ({"name": "f", "parameters": "x"}, "parameters' is 'x'"),
            ({"name": "f", "parameters": {"title": "\udfff"}}, "half of a surrogate pair"),
        ],
    )
    def test_odd_tools_are_bad_rows(self, tmp_path: Path, tool: dict[str, Any], said: str) -> None:
        path = write(tmp_path / "a.jsonl", {"prompt": "B?"}, {"prompt": "A?", "tools": [tool]})
        with pytest.raises(DataError, match=rf"{path}:2: .*{said}"):
            read_dataset(path)

    @pytest.mark.parametrize("score", ["NaN", "1" + "0" * 400])
    def test_scores_that_are_no_usable_number_are_bad_rows(self, tmp_path: Path, score: str) -> None:
        path = write(tmp_path / "a.jsonl", f'{{"prompt": "A?", "completion": "b", "stars": {score}}}')
        with pytest.raises(DataError, match=r"'stars' is .*a number is needed|'stars' is"):
            read_dataset(path, columns={"label": "stars>=4"})


class TestParquet:
    @pytest.fixture
    def pyarrow(self) -> Any:
        pytest.importorskip("pyarrow.parquet", reason="the extra `data` is not installed")
        import pyarrow

        return pyarrow

    def test_a_date_that_python_does_not_know_hurts_nobody(self, tmp_path: Path, pyarrow: Any) -> None:
        import pyarrow.parquet

        when = pyarrow.array([0, 10**15, None], pyarrow.timestamp("s"))
        table = pyarrow.table({"prompt": ["A?", "B?", "C?"], "when": when})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        rows = read_dataset(tmp_path / "a.parquet").rows
        assert [row.prompt[0].content for row in rows] == ["A?", "B?", "C?"]
        assert isinstance(rows[0], PromptRow) and rows[0].columns["when"] == datetime.datetime(1970, 1, 1)
        assert isinstance(rows[1], PromptRow) and rows[1].columns["when"] == str(10**18)

    def test_broken_utf8_is_a_bad_row(self, tmp_path: Path, pyarrow: Any) -> None:
        import pyarrow.parquet

        broken = pyarrow.array([b"A?", b"B\xff?"], pyarrow.binary()).view(pyarrow.string())
        pyarrow.parquet.write_table(pyarrow.table({"prompt": broken}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"a\.parquet:2: 'prompt' has byte 0xff, which is not UTF-8"):
            read_dataset(tmp_path / "a.parquet")
        assert len(read_dataset(tmp_path / "a.parquet", skip_bad_rows=True)) == 1


def prompts(*texts: str) -> list[PromptRow]:
    return [PromptRow((Message("user", text),), {}, f"rows.jsonl:{i}") for i, text in enumerate(texts, start=1)]


class TestNearCopies:
    def test_prompts_of_one_template_are_near_copies(self) -> None:
        things = ["shoes", "boots", "a hat", "two gloves"]
        train = prompts(*(f"How do I return {thing}?" for thing in things))
        assert near_copies(train, prompts("How do I return sandals?", "Where is my parcel today?")) == (1, 2)

    def test_prompts_that_share_small_words_are_not(self) -> None:
        train = prompts("What is the capital of France?", "How long do tomatoes need?")
        assert near_copies(train, prompts("What is the best way to learn the violin?", "Why do cats purr?")) == (0, 2)

    def test_scripts_without_spaces_are_compared_by_letters(self) -> None:
        assert near_copies(
            prompts("靴を返品するにはどうすればいいですか"), prompts("帽子を返品するにはどうすればいいですか")
        ) == (1, 1)

    def test_many_prompts_take_no_more_than_a_moment(self) -> None:
        train = prompts(*(f"{i} {i * 7} some question about {i % 97}" for i in range(20_000)))
        assert near_copies(train, train[:5_000])[1] == 100
