"""Data from a file as checked rows: bad rows are named, and every format reads the same."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from datafiles import LABELLED, PAIR, WRITERS, assistant, error_of, user, write_csv, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from mara_integrations.data import (
    Labelled,
    Pair,
    PromptRow,
    read_dataset,
    read_prompts,
)
from mara_integrations.errors import DataError


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
            ({**PAIR, "tools": "{"}, "'tools' is not JSON"),
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

    def test_columns_in_capitals_come_with_the_flags_that_map_them(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "rows.jsonl", [{name.capitalize(): value for name, value in PAIR.items()}])
        flags = "--column prompt=Prompt --column chosen=Chosen --column rejected=Rejected"
        assert f"{flags} reads columns of other names" in error_of(path).hint

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


class TestReadPrompts:
    def test_each_prompt_of_any_kind_is_given_once_in_file_order(self, tmp_path: Path) -> None:
        rows = [{**PAIR, "prompt": text} for text in ("one", "two", "ONE ", "three")]
        dataset = read_prompts(write_jsonl(tmp_path / "prefs.jsonl", rows))
        assert dataset.kind == "prompts"
        assert [row.prompt[0].content for row in dataset.rows] == ["one", "two", "three"]


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


SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the project's shared data folder is absent")


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
