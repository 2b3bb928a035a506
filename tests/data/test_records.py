"""Files as records: what their formats allow, what is tolerated in them, and how a broken one is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from datafiles import PAIR, error_of, write_csv, write_jsonl

from mara_integrations.data import (
    Pair,
    read_dataset,
)
from mara_integrations.errors import MissingExtraError
from mara_integrations.messages import Message


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
