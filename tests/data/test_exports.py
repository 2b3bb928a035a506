"""Exports of LangSmith and Langfuse as they come: what is taken for prompt, reply and label, and what is said.

The records follow LangSmith's run, feedback and example data formats (docs.langchain.com/langsmith/run-data-format,
feedback-data-format, example-data-format) and Langfuse's public API and table exports (api.reference.langfuse.com:
trace and score objects; langfuse.com/docs/api-and-data-platform/features/export-from-ui).
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from mara_integrations.data import Dataset, Labelled, PromptRow, read_dataset
from mara_integrations.errors import DataError
from mara_integrations.messages import Message, Tool, ToolCall


def run(**fields: Any) -> dict[str, Any]:
    """A run as LangSmith's SDK and API give it."""
    return {
        "id": "a36092d2-4ad5-4fb4-9c0d-0dba9a2ed836",
        "name": "chain",
        "run_type": "chain",
        "start_time": "2026-05-05T23:23:11.077838Z",
        "inputs": {"question": "Is it open?"},
        "outputs": {"answer": "Until six."},
        "error": None,
        "extra": {},
        "trace_id": "e26174e5-2190-4566-b970-7c3d9a621baa",
        "feedback_stats": None,
        **fields,
    }


def rated(key: str, average: float | None, **more: Any) -> dict[str, Any]:
    return {key: {"n": 1, "avg": average, "values": {}, "comments": ["as it was said"], **more}}


def trace(**fields: Any) -> dict[str, Any]:
    """A trace as Langfuse's API gives it."""
    return {
        "id": "t1",
        "timestamp": "2026-05-05T23:23:11.077Z",
        "name": "chat",
        "input": {"messages": [{"role": "user", "content": "Is it open?"}]},
        "output": {"role": "assistant", "content": "Until six."},
        "tags": ["shop"],
        "scores": [],
        **fields,
    }


def scored(name: str, value: float | None, **more: Any) -> dict[str, Any]:
    return {"id": "s1", "traceId": "t1", "name": name, "value": value, "dataType": "NUMERIC", "comment": None, **more}


def read(folder: Path, rows: list[Any], **options: Any) -> Dataset:
    path = folder / "export.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_dataset(path, **options)


def labels(dataset: Dataset) -> list[bool]:
    return [row.label for row in dataset.rows if isinstance(row, Labelled)]


ASKED = (Message("user", "Is it open?"),)


class TestLangSmithRuns:
    def test_inputs_outputs_and_feedback_are_a_labelled_reply(self, tmp_path: Path) -> None:
        rows = [run(feedback_stats=rated("user_score", 1.0)), run(feedback_stats=rated("user_score", 0.0))]
        dataset = read(tmp_path, rows)
        assert dataset.rows[0] == Labelled(ASKED, "Until six.", True, f"{tmp_path / 'export.jsonl'}:1")
        assert labels(dataset) == [True, False]
        assert dataset.notes[0] == "langsmith export, labelled by the feedback 'user_score'"

    def test_runs_that_nobody_judged_are_left_out_and_told_of(self, tmp_path: Path) -> None:
        rows = [run(), run(feedback_stats=rated("user_score", 1.0)), run(outputs=None, error="Timeout")]
        dataset = read(tmp_path, rows)
        assert len(dataset) == 1
        assert "2 of 3 runs are left out" in dataset.notes[1]

    def test_feedback_records_joined_to_their_run_are_read(self, tmp_path: Path) -> None:
        feedback = [
            {"key": "thumb", "score": True, "value": None, "comment": "helpful"},
            {"key": "thumb", "score": 1, "comment": None},
        ]
        assert labels(read(tmp_path, [run(feedback=feedback)])) == [True]

    def test_a_category_is_a_label_where_it_is_a_thumb(self, tmp_path: Path) -> None:
        rows = [run(feedback_stats=rated("verdict", None, values={"good": 2, "bad": 1}))]
        assert labels(read(tmp_path, rows)) == [True]

    def test_shares_are_good_above_the_middle_and_the_middle_says_nothing(self, tmp_path: Path) -> None:
        dataset = read(tmp_path, [run(feedback_stats=rated("correct", share)) for share in (0.9, 0.5, 0.2)])
        assert labels(dataset) == [True, False]
        assert dataset.notes[0].endswith("'correct', good above 0.5")

    def test_a_scale_has_to_be_explained(self, tmp_path: Path) -> None:
        rows = [run(feedback_stats=rated("stars", stars)) for stars in (5.0, 2.0, 4.0)]
        with pytest.raises(DataError, match="'stars' goes from 2 to 5") as caught:
            read(tmp_path, rows)
        assert caught.value.hint == "say it: --column 'label=stars>=3.5'"
        assert labels(read(tmp_path, rows, columns={"label": "stars>=4"})) == [True, False, True]

    def test_of_several_kinds_of_feedback_one_is_named(self, tmp_path: Path) -> None:
        rows = [run(feedback_stats={**rated("helpful", 1.0), **rated("polite", 0.0)})]
        with pytest.raises(DataError, match=r"more than one feedback: 'helpful' \(1 rows\), 'polite' \(1 rows\)"):
            read(tmp_path, rows)
        assert labels(read(tmp_path, rows, columns={"label": "polite"})) == [False]
        with pytest.raises(DataError, match="has no feedback 'kind'"):
            read(tmp_path, rows, columns={"label": "kind"})

    def test_a_run_of_a_chat_model_has_messages_as_langchain_serialises_them(self, tmp_path: Path) -> None:
        def message(kind: str, **kwargs: Any) -> dict[str, Any]:
            return {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", kind], "kwargs": kwargs}

        call = {"id": "1", "name": "hours", "args": {"day": "today"}, "type": "tool_call"}
        asked = [
            message("SystemMessage", content="Be brief.", type="system"),
            message("HumanMessage", content="Is it open?", type="human"),
            message("AIMessage", content="", tool_calls=[call]),
            message("ToolMessage", content="9 to 6", tool_call_id="1", status="success"),
        ]
        answer = message("AIMessage", content="Until six.", type="ai", tool_calls=[], invalid_tool_calls=[])
        tool = {"type": "function", "function": {"name": "hours", "parameters": {"type": "object"}}}
        dataset = read(
            tmp_path,
            [
                run(
                    run_type="llm",
                    inputs={"messages": [asked]},
                    outputs={"generations": [[{"text": "", "type": "ChatGeneration", "message": answer}]]},
                    extra={"invocation_params": {"tools": [tool]}},
                    feedback_stats=rated("user_score", 1.0),
                )
            ],
        )
        (row,) = dataset.rows
        assert isinstance(row, Labelled) and row.completion == "Until six."
        assert row.tools == (Tool("hours", "", {"type": "object"}),)
        assert row.prompt == (
            Message("system", "Be brief."),
            *ASKED,
            Message("assistant", "", (ToolCall("1", "hours", {"day": "today"}),)),
            Message("tool", "9 to 6", tool_call_id="1"),
        )

    @pytest.mark.parametrize(
        "inputs",
        [
            {"messages": [{"type": "human", "content": "Is it open?"}]},
            {"messages": [["human", "Is it open?"]]},
            {"messages": [{"role": "user", "content": "Is it open?"}], "temperature": 0},
            {"input": "Is it open?", "chat_history": []},
            {"anything": "Is it open?"},
            '{"question": "Is it open?"}',  # bulk exports keep objects as JSON text
        ],
    )
    def test_the_prompt_is_found_where_applications_put_it(self, tmp_path: Path, inputs: Any) -> None:
        assert read(tmp_path, [run(inputs=inputs)]).rows[0].prompt == ASKED

    @pytest.mark.parametrize(
        "outputs",
        [
            {"output": "Until six."},
            {"messages": [{"type": "human", "content": "Is it open?"}, {"type": "ai", "content": "Until six."}]},
            {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Until six."}}], "usage": {}},
            {"output": {"lc": 1, "id": ["x", "AIMessageChunk"], "kwargs": {"content": "Until six."}}},
        ],
    )
    def test_the_reply_is_found_where_applications_put_it(self, tmp_path: Path, outputs: Any) -> None:
        (row,) = read(tmp_path, [run(outputs=outputs, feedback_stats=rated("user_score", 1.0))]).rows
        assert isinstance(row, Labelled) and row.completion == "Until six."

    def test_where_it_is_not_found_the_way_to_name_it_is_shown(self, tmp_path: Path) -> None:
        rows = [run(inputs={"customer": "Ann", "ticket": "Is it open?"})]
        with pytest.raises(DataError, match="no prompt is found in 'inputs' with customer, ticket") as caught:
            read(tmp_path, rows)
        assert caught.value.hint == "name it: --column prompt=inputs.KEY"
        assert read(tmp_path, rows, columns={"prompt": "inputs.ticket"}).rows[0].prompt == ASKED


class TestLangSmithDatasets:
    def test_examples_are_prompts_with_what_was_expected_beside_them(self, tmp_path: Path) -> None:
        example = {"inputs": {"question": "Is it open?"}, "outputs": {"answer": "Until six."}, "metadata": {"n": 1}}
        dataset = read(tmp_path, [example])
        (row,) = dataset.rows
        assert isinstance(row, PromptRow) and row.columns == {"completion": "Until six."}
        assert dataset.notes[0].startswith("langsmith export without any feedback: inputs are prompts")

    def test_a_table_with_json_in_its_cells_is_read(self, tmp_path: Path) -> None:
        with (tmp_path / "export.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "inputs", "outputs"])
            writer.writerow(["1", json.dumps({"question": "Is it open?"}), json.dumps({"answer": "Until six."})])
        assert read_dataset(tmp_path / "export.csv").rows[0].prompt == ASKED

    def test_feedback_without_its_runs_is_refused(self, tmp_path: Path) -> None:
        feedback = {"id": "f1", "run_id": "r1", "key": "user_score", "score": 1.0, "value": None, "comment": "good"}
        with pytest.raises(DataError, match="this is feedback without the run that it judges"):
            read(tmp_path, [feedback])


class TestLangfuse:
    def test_traces_with_scores_are_labelled_replies(self, tmp_path: Path) -> None:
        rows = [
            trace(scores=[scored("feedback", 1, dataType="BOOLEAN")]),
            trace(scores=[scored("feedback", 0)]),
            trace(),
        ]
        dataset = read(tmp_path, rows)
        assert dataset.rows[0] == Labelled(ASKED, "Until six.", True, f"{tmp_path / 'export.jsonl'}:1")
        assert labels(dataset) == [True, False]
        assert "1 of 3 runs are left out" in dataset.notes[1]

    def test_a_categorical_score_is_read_by_its_name(self, tmp_path: Path) -> None:
        score = scored("verdict", 0, dataType="CATEGORICAL", stringValue="good")
        assert labels(read(tmp_path, [trace(scores=[score])])) == [True]

    def test_a_page_of_the_api_and_a_downloaded_trace_are_read(self, tmp_path: Path) -> None:
        one = trace(scores=[scored("feedback", 1)])
        for content in ({"data": [one], "meta": {"page": 1}}, one):
            (tmp_path / "trace.json").write_text(json.dumps(content, indent=2))
            assert labels(read_dataset(tmp_path / "trace.json")) == [True]

    def test_tables_have_a_column_for_each_score(self, tmp_path: Path) -> None:
        rows: list[Any] = [trace(feedback=[1, 1], comments=[], toolCallNames=["x"]), trace(feedback=[0])]
        for row in rows:
            del row["scores"]
        assert labels(read(tmp_path, rows)) == [True, False]

    def test_a_table_in_csv_is_read(self, tmp_path: Path) -> None:
        with (tmp_path / "export.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "timestamp", "input", "output", "tags", "feedback"])
            writer.writerow(["1", "2026-05-05", '"Is it open?"', '{"answer": "Until six."}', '["shop"]', "[1]"])
        assert labels(read_dataset(tmp_path / "export.csv")) == [True]

    def test_the_arguments_of_an_observed_function_are_the_prompt(self, tmp_path: Path) -> None:
        rows = [trace(input={"args": ["Is it open?"], "kwargs": {}})]
        assert read(tmp_path, rows).rows[0].prompt == ASKED

    def test_tools_that_a_generation_was_offered_are_kept(self, tmp_path: Path) -> None:
        tool = {"type": "function", "function": {"name": "hours", "parameters": {"type": "object"}}}
        rows = [trace(input={"messages": [{"role": "user", "content": "Is it open?"}], "tools": [tool]})]
        assert read(tmp_path, rows).rows[0].tools == (Tool("hours", "", {"type": "object"}),)

    def test_scores_without_their_traces_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="without the run"):
            read(tmp_path, [scored("feedback", 1)])

    def test_a_format_that_is_asked_for_goes_before_the_columns(self, tmp_path: Path) -> None:
        plain = {"input": "Is it open?", "output": "Until six."}
        with pytest.raises(DataError, match="of no known kind"):
            read(tmp_path, [plain])
        assert read(tmp_path, [plain], format="langfuse").rows[0].prompt == ASKED
