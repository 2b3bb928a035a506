"""What files of preferences may look like, what is said about those that are wrong, and how they are split."""

from __future__ import annotations

import csv
import json
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mara_integrations.data import (
    Dataset,
    Labelled,
    Pair,
    PromptRow,
    gather_columns,
    read_dataset,
    read_prompts,
    split,
)
from mara_integrations.errors import ConfigError, DataError, MissingExtraError
from mara_integrations.messages import Message, Tool, ToolCall

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the project's shared data folder is absent")

PAIR = {"prompt": "What colour is the sky?", "chosen": "It is blue.", "rejected": "It is green."}
LABELLED = {"prompt": "What colour is the sky?", "completion": "It is blue.", "label": True}

SKY = (Message("user", "What colour is the sky?"),)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: json.dumps(cell) if isinstance(cell, list) else cell for key, cell in row.items()})
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="reading Parquet needs the data extra")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


WRITERS: dict[str, Callable[[Path, list[Any]], Path]] = {
    "rows.jsonl": write_jsonl,
    "rows.json": write_json,
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
}


def error_of(path: Path, kind: Any = "auto") -> DataError:
    with pytest.raises(DataError) as caught:
        read_dataset(path, kind)
    return caught.value


class TestForms:
    @pytest.mark.parametrize("name", WRITERS)
    def test_a_pair_reads_the_same_from_every_format(self, tmp_path: Path, name: str) -> None:
        dataset = read_dataset(WRITERS[name](tmp_path / name, [PAIR]))

        line = 2 if name == "rows.csv" else 1  # a CSV's first row is its header
        expected = Pair(SKY, "It is blue.", "It is green.", f"{tmp_path / name}:{line}")
        assert (dataset.kind, dataset.form, dataset.rows) == ("pairs", "standard", (expected,))

    @pytest.mark.parametrize("name", WRITERS)
    def test_a_conversation_reads_the_same_from_every_format(self, tmp_path: Path, name: str) -> None:
        turns = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello!"), user("And the sky?")]
        row = {"prompt": turns, "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]}

        dataset = read_dataset(WRITERS[name](tmp_path / name, [row, row]))

        pair = dataset.rows[1]
        assert isinstance(pair, Pair)
        assert [message.role for message in pair.prompt] == ["system", "user", "assistant", "user"]
        assert (pair.chosen, pair.rejected, dataset.form) == ("Blue.", "Green.", "conversational")

    def test_an_implicit_prompt_is_the_messages_that_both_replies_begin_with(self, tmp_path: Path) -> None:
        start = [user("Hi"), assistant("Hello!"), user("And the sky?")]
        row = {"chosen": [*start, assistant("Blue.")], "rejected": [*start, assistant("Green.")]}

        (pair,) = read_dataset(write_jsonl(tmp_path / "prefs.jsonl", [row])).rows

        assert isinstance(pair, Pair)
        assert pair.prompt == (Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "And the sky?"))
        assert (pair.chosen, pair.rejected) == ("Blue.", "Green.")

    def test_a_string_prompt_beside_whole_conversations_is_taken_from_these(self, tmp_path: Path) -> None:
        row = {"prompt": "Hi", "chosen": [user("Hi"), assistant("Yes?")], "rejected": [user("Hi"), assistant("Bah.")]}

        (pair,) = read_dataset(write_jsonl(tmp_path / "prefs.jsonl", [row])).rows

        assert isinstance(pair, Pair)
        assert (pair.prompt, pair.chosen, pair.rejected) == ((Message("user", "Hi"),), "Yes?", "Bah.")

    def test_an_implicit_prompt_of_strings_ends_with_a_whole_word(self, tmp_path: Path) -> None:
        row = {"chosen": "The sky is blue.", "rejected": "The sky is black."}

        (pair,) = read_dataset(write_jsonl(tmp_path / "prefs.jsonl", [row])).rows

        assert isinstance(pair, Pair)
        assert (pair.prompt, pair.chosen, pair.rejected) == ((Message("user", "The sky is"),), "blue.", "black.")

    def test_a_string_reply_loses_the_space_that_trl_writes_before_it(self, tmp_path: Path) -> None:
        (row,) = read_dataset(write_jsonl(tmp_path / "a.jsonl", [{**LABELLED, "completion": " It is blue."}])).rows
        assert isinstance(row, Labelled)
        assert row.completion == "It is blue."

    @pytest.mark.parametrize(
        ("labels", "is_good"),
        [
            ([True, 1, 1.0, "1", "true", "good", "Yes", "up", "thumbs_up", "👍"], True),
            ([False, 0, 0.0, "0", "FALSE", "Bad", "no", "down", "thumbs down", "👎", -1], False),
        ],
    )
    def test_a_label_is_a_thumb_however_it_is_written(self, tmp_path: Path, labels: list[Any], is_good: bool) -> None:
        dataset = read_dataset(write_jsonl(tmp_path / "a.jsonl", [{**LABELLED, "label": label} for label in labels]))
        assert [row.label for row in dataset.rows if isinstance(row, Labelled)] == [is_good] * len(labels)

    def test_a_prompts_other_fields_are_columns_for_reward_functions(self, tmp_path: Path) -> None:
        rows = [{"prompt": "2 + 2?", "answer": 4}, {"prompt": "Name?", "answer": None, "level": "easy"}]

        dataset = read_dataset(write_jsonl(tmp_path / "prompts.jsonl", rows))

        prompts = [row for row in dataset.rows if isinstance(row, PromptRow)]
        assert dataset.kind == "prompts"
        assert gather_columns(prompts) == {"answer": [4, None], "level": [None, "easy"]}

    def test_tools_and_calls_in_a_prompts_earlier_turns_are_read(self, tmp_path: Path) -> None:
        schema = {"type": "object", "properties": {"city": {"type": "string"}}}
        tool = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": schema}}
        call = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
        turns = [
            {"role": "developer", "content": "Be brief."},
            user("Rain in Oslo?"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "no"},
        ]
        row = {"prompt": turns, "chosen": [assistant("No.")], "rejected": [assistant("Who knows?")]}

        for tools in ([tool], json.dumps([tool])):  # TRL keeps them as JSON text in Parquet
            (pair,) = read_dataset(write_jsonl(tmp_path / "prefs.jsonl", [{**row, "tools": tools}])).rows
            assert pair.tools == (Tool("weather", "Now.", schema),)
        assert pair.prompt == (
            Message("system", "Be brief."),
            Message("user", "Rain in Oslo?"),
            Message("assistant", "", (ToolCall("1", "weather", {"city": "Oslo"}),)),
            Message("tool", "no", tool_call_id="1"),
        )
        assert len({pair.prompt: 1, tuple(pair.prompt): 2}) == 1  # prompts are keys, whatever they call

    def test_nulls_that_parquet_adds_to_arguments_of_other_calls_are_dropped(self, tmp_path: Path) -> None:
        def prompt(arguments: dict[str, Any]) -> list[Any]:
            call = {"function": {"name": "f", "arguments": arguments}}
            return [user("Hi"), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "x"}]

        rows = [{"prompt": prompt({"a": 1})}, {"prompt": prompt({"b": 2})}]
        dataset = read_dataset(write_parquet(tmp_path / "rows.parquet", rows))
        assert [row.prompt[1].tool_calls[0].arguments for row in dataset.rows] == [{"a": 1}, {"b": 2}]

    def test_content_in_text_parts_is_joined(self, tmp_path: Path) -> None:
        parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]
        (row,) = read_dataset(
            write_jsonl(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": parts}]}])
        ).rows
        assert row.prompt[0].content == "One\ntwo"

    def test_replies_without_any_label_are_prompts_with_a_column(self, tmp_path: Path) -> None:
        dataset = read_dataset(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Hi", "completion": "Yes?"}]))
        assert dataset.kind == "prompts" and dataset.rows[0].columns == {"completion": "Yes?"}  # type: ignore[union-attr]

    def test_a_whole_conversation_is_a_prompt_and_its_last_turn(self, tmp_path: Path) -> None:
        dataset = read_dataset(write_jsonl(tmp_path / "a.jsonl", [{"messages": [user("Hi"), assistant("Yes?")]}]))
        assert dataset.rows[0].prompt == (Message("user", "Hi"),) and dataset.form == "conversational"
        assert dataset.rows[0].columns == {"completion": [assistant("Yes?")]}  # type: ignore[union-attr]

    def test_a_kind_that_is_asked_for_goes_before_the_columns(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "prefs.jsonl", [PAIR])
        (row,) = read_dataset(path, "prompts").rows
        assert row == PromptRow(SKY, {"chosen": "It is blue.", "rejected": "It is green."}, f"{path}:1")

    def test_an_unknown_kind_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="format='triples'"):
            read_dataset(tmp_path / "prefs.jsonl", "triples")  # type: ignore[arg-type]  # the mistake under test


class TestTolerance:
    def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_no_news(self, tmp_path: Path) -> None:
        path = tmp_path / "prefs.jsonl"
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\r\n  \r\n" + json.dumps(PAIR).encode())
        assert [row.source for row in read_dataset(path).rows] == [f"{path}:1", f"{path}:4"]

    def test_the_same_in_csv(self, tmp_path: Path) -> None:
        path = tmp_path / "prefs.csv"
        path.write_bytes(b"\xef\xbb\xbfprompt,chosen,rejected\r\n\r\nHi,Yes?,Bah.\r\n,,\r\n")
        (row,) = read_dataset(path).rows
        assert row == Pair((Message("user", "Hi"),), "Yes?", "Bah.", f"{path}:3")

    def test_a_spreadsheet_may_part_cells_by_semicolons(self, tmp_path: Path) -> None:
        path = tmp_path / "prefs.csv"
        path.write_text('prompt;chosen;rejected\n"Hi, you";Yes?;Bah.\n')
        (row,) = read_dataset(path).rows
        assert row.prompt == (Message("user", "Hi, you"),)

    def test_json_lines_in_a_json_file_are_read(self, tmp_path: Path) -> None:
        assert len(read_dataset(write_jsonl(tmp_path / "prefs.json", [PAIR, PAIR]))) == 2

    def test_line_separators_within_a_string_do_not_end_a_line(self, tmp_path: Path) -> None:
        path = tmp_path / "prompts.jsonl"
        path.write_text(json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False), encoding="utf-8")
        assert read_dataset(path).rows[0].prompt[0].content == "a\u2028b\x85c"

    def test_a_cell_of_a_megabyte_is_read(self, tmp_path: Path) -> None:
        dataset = read_dataset(write_csv(tmp_path / "prompts.csv", [{"prompt": "x" * 2**20}]))
        assert len(dataset.rows[0].prompt[0].content) == 2**20


class TestBadFiles:
    def test_a_missing_file_is_named_with_its_neighbours(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "prefs.jsonl", [PAIR])
        error = error_of(tmp_path / "pref.jsonl")
        assert error.message == f"{tmp_path / 'pref.jsonl'} does not exist"
        assert error.hint == "did you mean prefs.jsonl?"

    def test_a_missing_folder_is_named(self, tmp_path: Path) -> None:
        assert "there is no folder" in str(error_of(tmp_path / "absent" / "prefs.jsonl"))

    def test_a_folder_is_refused_with_the_files_in_it(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "prefs.jsonl", [PAIR])
        error = error_of(tmp_path)
        assert error.message == f"{tmp_path} is a folder"
        assert error.hint == "name one file in it: prefs.jsonl"

    @pytest.mark.parametrize(
        ("name", "text"), [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.csv", "prompt,chosen\n")]
    )
    def test_a_file_without_rows_is_refused(self, tmp_path: Path, name: str, text: str) -> None:
        (tmp_path / name).write_text(text)
        assert error_of(tmp_path / name).message.endswith("is empty: it has no rows")

    def test_another_ending_is_refused_with_those_allowed(self, tmp_path: Path) -> None:
        (tmp_path / "prefs.xlsx").write_text("?")
        error = error_of(tmp_path / "prefs.xlsx")
        assert "'.xlsx'" in error.message
        assert error.hint == "allowed are .jsonl, .ndjson, .json, .csv, .parquet"

    def test_bytes_that_are_not_utf_8_are_named_with_their_line(self, tmp_path: Path) -> None:
        path = tmp_path / "prompts.jsonl"
        path.write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
        assert error_of(path).message == f"{path}:2: byte 0xe9 is not UTF-8"

    def test_a_broken_json_list_is_named_with_its_line(self, tmp_path: Path) -> None:
        (tmp_path / "prefs.json").write_text('[\n{"prompt": "a"},\n{"prompt": }\n]')
        assert error_of(tmp_path / "prefs.json").message.startswith(f"{tmp_path / 'prefs.json'}:3: broken JSON")

    def test_a_quote_left_open_is_broken_csv(self, tmp_path: Path) -> None:
        (tmp_path / "prefs.csv").write_text('prompt,chosen,rejected\n"Hi,Yes?,Bah.\n')
        assert "broken CSV" in error_of(tmp_path / "prefs.csv").message

    def test_a_column_that_stands_twice_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "prefs.csv").write_text("prompt,chosen,chosen\na,b,c\n")
        assert "'chosen' stands twice" in error_of(tmp_path / "prefs.csv").message

    def test_a_damaged_parquet_file_is_refused(self, tmp_path: Path) -> None:
        pytest.importorskip("pyarrow", reason="reading Parquet needs the data extra")
        (tmp_path / "prefs.parquet").write_bytes(b"PAR1 and then nothing")
        assert "not a readable Parquet file" in error_of(tmp_path / "prefs.parquet").message

    def test_parquet_without_pyarrow_names_the_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
        (tmp_path / "prefs.parquet").write_bytes(b"PAR1")
        with pytest.raises(MissingExtraError, match=r"mara-integrations\[data\]"):
            read_dataset(tmp_path / "prefs.parquet")


class TestBadRows:
    def test_a_bad_row_is_named_with_what_is_needed_and_how_many_there_are(self, tmp_path: Path) -> None:
        lacking = {"prompt": "Hi", "rejected": "Bah."}
        path = write_jsonl(tmp_path / "prefs.jsonl", [PAIR] * 16 + [lacking] * 3 + [PAIR] * 101)

        error = error_of(path)

        needs = "a pair needs prompt, chosen, rejected"
        assert error.message == (f"{path}:17: 'chosen' is missing; {needs} (3 of 120 rows are bad; the first is shown)")
        assert error.hint == "the row has prompt, rejected"

    def test_a_line_that_is_not_json_counts_as_a_bad_row(self, tmp_path: Path) -> None:
        path = tmp_path / "prefs.jsonl"
        path.write_text(f"{json.dumps(PAIR)}\n{{oops\n[1]\n")
        message = error_of(path).message
        assert message.startswith(f"{path}:2: broken JSON")
        assert message.endswith("(2 of 3 rows are bad; the first is shown)")

    def test_a_file_of_nothing_readable_says_so(self, tmp_path: Path) -> None:
        (tmp_path / "prefs.jsonl").write_text("hello\nworld\n")
        assert error_of(tmp_path / "prefs.jsonl").message.endswith("(none of 2 rows can be read)")

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({**PAIR, "chosen": None}, "'chosen' is missing"),
            ({**PAIR, "chosen": "  "}, "'chosen' is empty"),
            ({**PAIR, "chosen": 3}, "'chosen' and 'rejected' differ in form"),
            ({**PAIR, "chosen": 3, "rejected": 4}, "'chosen' is 3"),
            ({**PAIR, "chosen": [], "rejected": []}, "'chosen' is an empty list"),
            ({**PAIR, "chosen": [user("Hi")], "rejected": [user("Ho")]}, "'chosen' has messages of user"),
            ({**PAIR, "prompt": ""}, "'prompt' is empty"),
            ({**PAIR, "prompt": 7}, "'prompt' is 7"),
            ({**PAIR, "prompt": []}, "'prompt' is an empty list"),
            ({**PAIR, "prompt": [user("Hi"), assistant("Yes?")]}, "'prompt' ends with a message of the assistant"),
            ({**PAIR, "prompt": ["Hi"]}, "'prompt[0]' is 'Hi'"),
            ({**PAIR, "prompt": [{"role": "robot", "content": "Hi"}]}, "'prompt[0]' has the role 'robot'"),
            ({**PAIR, "prompt": [{"role": "user", "content": ["Hi"]}]}, "'prompt[0].content' is ['Hi']"),
            ({**PAIR, "prompt": [{**user("Hi"), "tool_calls": [{}]}]}, "'prompt[0]' of the user has tool calls"),
            ({**PAIR, "prompt": "half \ud83d"}, "half of a surrogate pair"),
            ({**PAIR, "chosen": [{**assistant(""), "tool_calls": [{"name": "f"}]}]}, "differ in form"),
            (
                {**PAIR, "prompt": [{"role": "assistant", "tool_calls": [{}]}, user("x")]},
                "'prompt[0].tool_calls[0]' is {}",
            ),
            ({**PAIR, "tools": "{"}, "'tools' is no JSON"),
            ({**PAIR, "tools": [{"description": "x"}]}, "'tools[0]' is {'description': 'x'}"),
            ({**LABELLED, "label": "meh"}, "'label' is 'meh'"),
            ({**LABELLED, "label": 0.5}, "'label' is 0.5"),
            ({"question": "Hi", "answer": "Yes?"}, "the columns 'question', 'answer' are of no known kind"),
            ({"chosen": "Yes", "rejected": "No"}, "begin differently"),
            ({"chosen": "Oh yes", "rejected": "Oh yes"}, "are the same"),
        ],
    )
    def test_what_is_wrong_with_a_row_is_said(self, tmp_path: Path, row: dict[str, Any], said: str) -> None:
        assert said in error_of(write_jsonl(tmp_path / "rows.jsonl", [row])).message

    def test_a_reply_without_label_among_labelled_ones_is_a_bad_row(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "rows.jsonl", [LABELLED, {"prompt": "Hi", "completion": "Yes?"}])
        assert "rows.jsonl:2: 'label' is missing; a labelled reply needs" in error_of(path).message

    def test_bad_rows_are_left_out_on_demand_and_told_of(self, tmp_path: Path) -> None:
        other = {**PAIR, "prompt": "And the sea?"}
        path = write_jsonl(
            tmp_path / "prefs.jsonl", [PAIR, {**PAIR, "chosen": ""}, other, *[{**PAIR, "prompt": 7}] * 3]
        )

        dataset = read_dataset(path, skip_bad_rows=True)

        assert [row.source for row in dataset.rows] == [f"{path}:1", f"{path}:3"]
        assert dataset.notes == (
            f"4 of 6 rows are left out: {path}:2: 'chosen' is empty; {path}:4: 'prompt' is 7; {path}:5: 'prompt' is 7; "
            "and 1 more",
        )

    def test_where_all_rows_are_bad_there_is_nothing_to_go_on_with(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="2 of 2 rows are bad"):
            read_dataset(write_jsonl(tmp_path / "a.jsonl", [{"prompt": 7}] * 2), skip_bad_rows=True)

    def test_a_row_without_prompt_among_rows_with_one_is_no_implicit_prompt(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "prefs.jsonl", [PAIR, {"chosen": "I like it", "rejected": "I hate it"}])
        assert error_of(path).message.startswith(f"{path}:2: 'prompt' is missing")

    def test_kinds_are_not_mixed_in_a_file(self, tmp_path: Path) -> None:
        error = error_of(write_jsonl(tmp_path / "rows.jsonl", [PAIR, PAIR, LABELLED]))
        assert error.message == f"{tmp_path / 'rows.jsonl'}:3: this row is a labelled reply, row 1 is a pair"

    def test_messages_in_csv_that_python_printed_are_not_taken_for_text(self, tmp_path: Path) -> None:
        path = write_csv(tmp_path / "prompts.csv", [{"prompt": str([user("Hi")])}])
        error = error_of(path)
        assert error.message.startswith(f"{path}:2: 'prompt' looks like messages and is not JSON")
        assert error.hint == "write such cells with json.dumps, not str"

    def test_a_csv_row_with_too_many_cells_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "prefs.csv").write_text("prompt,chosen,rejected\nHi, you,Yes?,Bah.\n")
        assert "the row has 4 cells, the header 3" in error_of(tmp_path / "prefs.csv").message


# Words in several scripts, with what CSV and JSON must quote; NUL is left out: CSV can't hold it before Python 3.11.
_ALPHABET = st.characters(codec="utf-8", exclude_characters="\0")
texts = st.text(_ALPHABET, min_size=1, max_size=20).map(lambda text: f"a{text}")
pairs = st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts})
labelled = st.fixed_dictionaries({"prompt": texts, "completion": texts, "label": st.booleans()})
prompts = st.fixed_dictionaries({"prompt": texts, "topic": texts})
conversations = st.fixed_dictionaries(
    {
        "prompt": st.tuples(texts, texts, texts).map(lambda t: [user(t[0]), assistant(t[1]), user(t[2])]),
        "chosen": texts.map(lambda text: [assistant(text)]),
        "rejected": texts.map(lambda text: [assistant(text)]),
    }
)
files = st.one_of(*(st.lists(row, min_size=1, max_size=5) for row in (pairs, labelled, prompts, conversations)))


class TestLaws:
    @given(rows=files)
    @settings(max_examples=50, deadline=None)
    def test_what_was_written_is_what_is_read_in_every_format(self, rows: list[dict[str, Any]]) -> None:
        def text_of(value: Any) -> Any:
            return value[0]["content"] if isinstance(value, list) else value

        with tempfile.TemporaryDirectory() as folder:
            datasets = [read_dataset(write(Path(folder) / name, rows)) for name, write in WRITERS.items()]

        for written, read in zip(rows, datasets[0].rows, strict=True):
            prompt = written["prompt"]
            turns = prompt if isinstance(prompt, list) else [user(prompt)]
            assert [{"role": message.role, "content": message.content} for message in read.prompt] == turns
            match read:
                case Pair():
                    assert [read.chosen, read.rejected] == [text_of(written["chosen"]), text_of(written["rejected"])]
                case Labelled():
                    assert (read.completion, read.label) == (written["completion"], written["label"])
                case PromptRow():
                    assert read.columns == {"topic": written["topic"]}
        assert len({dataset.fingerprint for dataset in datasets}) == 1
        assert len({(dataset.kind, dataset.form) for dataset in datasets}) == 1

    @given(names=st.lists(texts, min_size=2, max_size=30), share=st.floats(0.01, 0.99), seed=st.integers(0, 99))
    def test_a_split_parts_all_rows_and_never_a_prompt(self, names: list[str], share: float, seed: int) -> None:
        dataset = prompts_of(names)
        if len({row_key(row) for row in dataset.rows}) < 2:
            return

        train, held_out = split(dataset, share, seed)

        assert len(train) > 0
        assert len(held_out) > 0
        assert sorted(row.source for row in train.rows + held_out.rows) == sorted(row.source for row in dataset.rows)
        assert not {row_key(row) for row in train.rows} & {row_key(row) for row in held_out.rows}

    @given(names=st.lists(texts, min_size=2, max_size=30), shuffle=st.randoms(use_true_random=False))
    def test_a_split_does_not_depend_on_the_order_of_rows(self, names: list[str], shuffle: random.Random) -> None:
        if len({row_key(row) for row in prompts_of(names).rows}) < 2:
            return
        _, before = split(prompts_of(names), 0.3)
        shuffle.shuffle(names)
        _, after = split(prompts_of(names), 0.3)
        assert {row_key(row) for row in before.rows} == {row_key(row) for row in after.rows}


def prompts_of(names: list[str]) -> Dataset:
    rows = (PromptRow((Message("user", name),), {}, f"rows.jsonl:{i}") for i, name in enumerate(names, start=1))
    return Dataset("prompts", tuple(rows), Path("rows.jsonl"))


def row_key(row: Any) -> str:
    return " ".join(row.prompt[0].content.split()).casefold()


class TestSplit:
    def test_prompts_that_differ_in_case_and_spacing_are_the_same(self) -> None:
        train, held_out = split(prompts_of(["Hello  there", "hello there ", "HELLO there", "Bye"]), 0.5)
        assert sorted([len(train), len(held_out)]) == [1, 3]

    def test_a_larger_share_holds_out_a_superset(self) -> None:
        dataset = prompts_of([f"prompt {i}" for i in range(100)])
        small, large = ({row.source for row in split(dataset, share)[1].rows} for share in (0.1, 0.2))
        assert (len(small), len(large)) == (10, 20)
        assert small < large

    def test_adding_rows_keeps_most_prompts_where_they_were(self) -> None:
        names = [f"prompt {i}" for i in range(1000)]
        _, before = split(prompts_of(names), 0.1)
        _, after = split(prompts_of(names + [f"new {i}" for i in range(100)]), 0.1)
        kept = {row_key(row) for row in before.rows} & {row_key(row) for row in after.rows}
        assert len(kept) >= 85  # of 100; by chance it would be ten

    def test_another_seed_gives_another_split(self) -> None:
        dataset = prompts_of([f"prompt {i}" for i in range(100)])
        assert split(dataset, seed=1)[1].fingerprint != split(dataset, seed=2)[1].fingerprint

    def test_one_prompt_can_not_be_split(self) -> None:
        with pytest.raises(DataError, match="all 2 rows have the same prompt"):
            split(prompts_of(["Hi", "hi"]))

    @given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2), st.floats(0.05, 0.95), st.integers(0, 9))
    def test_labels_are_on_both_sides_where_any_split_by_prompt_has_them_there(
        self, thumbs: list[tuple[int, bool]], share: float, seed: int
    ) -> None:
        rows = [
            Labelled((Message("user", str(prompt)),), "reply", label, f"rows.jsonl:{i}")
            for i, (prompt, label) in enumerate(thumbs)
        ]
        dataset = Dataset("labelled", tuple(rows), Path("rows.jsonl"))
        if len({prompt for prompt, _ in thumbs}) < 2:
            return
        good, bad = ({prompt for prompt, label in thumbs if label is wanted} for wanted in (True, False))

        sides = split(dataset, share, seed)

        if len(good) >= 2 and len(bad) >= 2:
            assert [{row.label for row in side.rows if isinstance(row, Labelled)} for side in sides] == [
                {True, False}, {True, False},
            ]  # fmt: skip
        assert sides == split(replace(dataset, rows=tuple(rows)), share, seed), "the same each time"
        assert not {row_key(row) for row in sides[0].rows} & {row_key(row) for row in sides[1].rows}

    @pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 7])
    def test_a_share_outside_0_and_1_is_refused(self, share: float) -> None:
        with pytest.raises(ConfigError, match="held_out="):
            split(prompts_of(["Hi", "Bye"]), share)


class TestReadPrompts:
    def test_each_prompt_of_any_kind_is_given_once_in_file_order(self, tmp_path: Path) -> None:
        rows = [{**PAIR, "prompt": text} for text in ("one", "two", "ONE ", "three")]
        dataset = read_prompts(write_jsonl(tmp_path / "prefs.jsonl", rows))
        assert dataset.kind == "prompts"
        assert [row.prompt[0].content for row in dataset.rows] == ["one", "two", "three"]


class TestFingerprint:
    def test_it_changes_with_content_and_not_with_place(self, tmp_path: Path) -> None:
        here = read_dataset(write_jsonl(tmp_path / "here.jsonl", [PAIR]))
        there = read_dataset(write_csv(tmp_path / "there.csv", [PAIR]))
        other = read_dataset(write_jsonl(tmp_path / "other.jsonl", [{**PAIR, "chosen": "It is grey."}]))
        assert here.fingerprint == there.fingerprint
        assert here.fingerprint != other.fingerprint


@needs_shared_data
class TestRealData:
    def test_multi_turn_pairs_are_read_whole(self) -> None:
        dataset = read_dataset(SHARED / "hh_harmless_pairs.jsonl")
        assert (dataset.kind, dataset.form, len(dataset)) == ("pairs", "conversational", 1500)
        assert max(len(row.prompt) for row in dataset.rows) > 20
        assert all(row.prompt[-1].role == "user" for row in dataset.rows)

    def test_prompts_that_come_twice_are_given_once(self) -> None:
        path = SHARED / "saferlhf_prompts_test.jsonl"
        assert (len(read_dataset(path)), len(read_prompts(path))) == (200, 199)
