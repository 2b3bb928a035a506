"""Rows of TRL's formats: pairs, labelled replies and prompts, standard and conversational, with their tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datafiles import LABELLED, PAIR, SKY, WRITERS, assistant, user, write_jsonl, write_parquet

from mara_integrations.data import (
    Labelled,
    Pair,
    PromptRow,
    gather_columns,
    read_dataset,
)
from mara_integrations.errors import ConfigError, DataError
from mara_integrations.messages import Message, Tool, ToolCall


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

    def test_a_rating_in_place_of_a_label_comes_with_the_flag_that_reads_it(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="'label' is 5") as error:
            read_dataset(write_jsonl(tmp_path / "a.jsonl", [{**LABELLED, "label": 5}]))
        assert "--column 'label=NAME>=4'" in str(error.value.hint)

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
