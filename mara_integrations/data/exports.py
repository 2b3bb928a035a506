"""Converts exports of LangSmith and Langfuse to rows of TRL's types: runs with feedback, traces with scores.

A run's inputs become the prompt, its outputs the reply, and a feedback key or score name the label. Without feedback,
as in data sets of examples, the inputs become prompts and the outputs a column beside them.

Source: LangSmith's run, feedback and example data formats (docs.langchain.com/langsmith/run-data-format,
feedback-data-format, example-data-format); Langfuse's trace, observation and score fields
(langfuse.com/docs/api-and-data-platform/features/blob-storage-export-fields, export-from-ui).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mara_integrations.data.columns import Column, decoded
from mara_integrations.data.records import BadRowError, Fields, Record, short
from mara_integrations.data.trl import label_of
from mara_integrations.errors import DataError

Export = Literal["langsmith", "langfuse"]

_RUN = {"langsmith": ("inputs", "outputs"), "langfuse": ("input", "output")}
_LANGFUSE_MARKS = {"traceId", "trace_id", "timestamp", "startTime", "start_time", "scores", "observations", "projectId"}
_LANGFUSE_LISTS = {"tags", "traceTags", "trace_tags", "comments", "observations", "toolCalls", "toolCallNames"}
_PROMPT_KEYS = ("messages", "input", "question", "query", "prompt", "text", "content", "user_input", "chat_input")
_REPLY_KEYS = ("output", "answer", "response", "content", "text", "completion", "result", "message", "messages")
_LANGCHAIN_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool"}


def export_of(records: Sequence[Record]) -> Export | None:
    """Return the platform that the rows were exported from; None if they are not an export."""
    names: set[str] = set()
    for _, record in records:
        if isinstance(record, dict):
            names |= record.keys()
    if names & {"prompt", "chosen", "rejected", "messages"}:
        return None
    if "inputs" in names:
        return "langsmith"
    return "langfuse" if "input" in names and names & _LANGFUSE_MARKS else None


def check_has_runs(path: Path, records: Sequence[Record]) -> None:
    """Refuse feedback without runs.

    Raises:
        DataError: If the rows are feedback or scores without the runs that they judge.
    """
    for line, record in records:
        names = record.keys() if isinstance(record, dict) else set()
        is_langsmiths = {"key", "score", "run_id"} <= names
        if is_langsmiths or ({"name", "value"} <= names and {"traceId", "trace_id"} & names and "input" not in names):
            raise DataError(
                f"{path}:{line}: this is feedback without the run that it judges",
                hint="export the runs with their feedback_stats, or the traces with their scores",
            )


@dataclass(frozen=True, slots=True)
class _Run:
    prompt: Any
    reply: Any
    tools: Any
    feedback: Mapping[str, Any]


def rows_of_export(
    path: Path, export: Export, records: Sequence[Record], columns: Mapping[str, Column]
) -> tuple[list[Record], list[str]]:
    """Return rows of TRL's types, and notes on how the export was understood.

    Args:
        path: Path of the export, for messages.
        export: Platform of the export.
        records: Rows of the export.
        columns: Columns of prompt and completion, where they can't be inferred; `label` names a feedback key.

    Raises:
        DataError: If there are several feedback keys, or one on an unknown scale, and `columns` does not say more.
    """
    runs: list[tuple[int, _Run | BadRowError]] = []
    for line, record in records:
        try:
            runs.append((line, record if isinstance(record, BadRowError) else _run(record, export, columns)))
        except BadRowError as error:
            runs.append((line, error))
    keys = Counter(key for _, run in runs if isinstance(run, _Run) for key in run.feedback)
    where = "feedback" if export == "langsmith" else "score"
    label = columns.get("label")
    if not keys and label is None:
        made = [(line, run if isinstance(run, BadRowError) else _fields(run)) for line, run in runs]
        return made, [f"{export} export without any {where}: inputs are prompts, outputs a column 'completion'"]
    if label is None and len(keys) > 1:
        raise DataError(
            f"{path} has more than one {where}: {', '.join(f'{key!r} ({n} rows)' for key, n in keys.most_common())}",
            hint=f"name the one to train on: --column label={keys.most_common()[0][0]}",
        )
    key = label.path if label is not None else next(iter(keys))
    if key not in keys:
        raise DataError(f"{path} has no {where} {key!r}", hint=f"it has {', '.join(map(repr, keys)) or 'none'}")
    given = [run.feedback[key] for _, run in runs if isinstance(run, _Run) and key in run.feedback]
    judge, scale = _judge(path, key, label, given)
    rows: list[Record] = []
    left_out = 0
    for line, run in runs:
        if isinstance(run, BadRowError):
            rows.append((line, run))
        elif key not in run.feedback or (verdict := judge(run.feedback[key])) is None:
            left_out += 1
        else:
            rows.append((line, {**_fields(run), "label": verdict}))
    notes = [f"{export} export, labelled by the {where} {key!r}{scale}"]
    if left_out:
        notes.append(f"{left_out} of {len(runs)} runs are left out: nobody gave them a clear {where} {key!r}")
    return rows, notes


def _judge(
    path: Path, key: str, label: Column | None, values: Sequence[Any]
) -> tuple[Callable[[Any], bool | None], str]:
    """Return a function from a score to its label, None for neither good nor bad, and the rule in words."""
    if label is not None and label.comparison is not None:
        return label.is_good, f", good where {label.comparison} {label.bound:g}"
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(numbers) < len(values) or set(numbers) <= {0, 1, -1}:
        return label_of, ""
    low, high = min(numbers), max(numbers)
    if low < -1 or high > 1:
        raise DataError(
            f"{path}: {key!r} goes from {low:g} to {high:g}, and nothing says which of these are good",
            hint=f"say it: --column 'label={key}>={(low + high) / 2:g}'",
        )
    middle = 0.5 if low >= 0 else 0.0
    return lambda value: None if value == middle else value > middle, f", good above {middle:g}"


def _fields(run: _Run) -> Fields:
    fields = {"prompt": run.prompt, "completion": run.reply, "tools": run.tools}
    return {name: value for name, value in fields.items() if value is not None}


def _run(record: Fields, export: Export, columns: Mapping[str, Column]) -> _Run:
    inputs_name, outputs_name = _RUN[export]
    inputs, outputs = (decoded(record.get(name)) for name in (inputs_name, outputs_name))
    prompt = columns["prompt"].value_in(record) if "prompt" in columns else _conversation(inputs, inputs_name)
    if "completion" in columns:
        reply = columns["completion"].value_in(record)
    else:
        reply = None if outputs in (None, {}, "") else _reply(outputs, outputs_name)
    offered = decoded(record.get("extra")) or {}
    tools = (inputs or {}).get("tools") if isinstance(inputs, dict) else None
    if isinstance(offered, dict) and isinstance(offered.get("invocation_params"), dict):
        tools = tools or offered["invocation_params"].get("tools")
    feedback = _langsmith_feedback(record) if export == "langsmith" else _langfuse_scores(record)
    return _Run(prompt, reply, tools, {} if reply is None else feedback)


def _langsmith_feedback(record: Fields) -> dict[str, Any]:
    """Return one value a feedback key, from the statistics that a run carries or from the records joined to it."""
    stats, given = decoded(record.get("feedback_stats")), decoded(record.get("feedback"))
    feedback: dict[str, Any] = {}
    for key, stat in stats.items() if isinstance(stats, dict) else ():
        if isinstance(stat, dict) and stat.get("n") != 0:
            values = stat.get("values")
            named = max(values, key=lambda word: values[word]) if isinstance(values, dict) and values else None
            feedback[key] = stat["avg"] if stat.get("avg") is not None else named
    by_key: dict[str, list[Any]] = {}
    for item in given if isinstance(given, list) else ():
        if isinstance(item, dict) and "key" in item:
            by_key.setdefault(item["key"], []).append(item["value"] if item.get("score") is None else item["score"])
    feedback |= {key: _together(values) for key, values in by_key.items()}
    return {key: value for key, value in feedback.items() if value is not None}


def _langfuse_scores(record: Fields) -> dict[str, Any]:
    """Return one value a score name, from the API's list of scores or from the columns of exported tables."""
    scores = decoded(record.get("scores"))
    by_name: dict[str, list[Any]] = {}
    for item in scores if isinstance(scores, list) else ():
        if isinstance(item, dict) and "name" in item:
            is_text = item.get("dataType", item.get("data_type")) == "CATEGORICAL" or item.get("value") is None
            value = item.get("stringValue", item.get("string_value")) if is_text else item["value"]
            by_name.setdefault(item["name"], []).append(value)
    for name, cell in scores.items() if isinstance(scores, dict) else record.items():
        values = decoded(cell)
        is_score = isinstance(values, list) and values and all(isinstance(v, int | float | str) for v in values)
        if is_score and name not in _LANGFUSE_LISTS and name not in _RUN["langfuse"]:
            by_name.setdefault(name, []).extend(values)
    found = {name: _together(values) for name, values in by_name.items()}
    return {name: value for name, value in found.items() if value is not None}


def _together(values: Sequence[Any]) -> Any:
    """Merge the scores of several people: take the mean of numbers, or the most frequent word."""
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, int | float) for value in present):
        return sum(present) / len(present)
    return Counter(map(str, present)).most_common(1)[0][0] if present else None


def _conversation(value: Any, name: str) -> Any:
    """Return the prompt of a run: a string, or messages in TRL's form."""
    value = decoded(value)
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if isinstance(value[0], list) and not all(isinstance(part, str) for part in value[0]):  # a batch of one
            return _conversation(value[0], name)
        return [_turn(item) for item in value]
    if isinstance(value, dict):
        if {"args", "kwargs"} <= value.keys():  # Langfuse's decorator records a function's arguments
            value = {**value["kwargs"], **{f"args[{i}]": item for i, item in enumerate(value["args"])}}
        if {"role", "content"} <= value.keys() or _is_langchains(value):
            return [_turn(value)]
        if (key := _known_key(value, _PROMPT_KEYS)) is not None:
            return _conversation(value[key], f"{name}.{key}")
    raise BadRowError(f"no prompt is found in {_shown(name, value)}", hint=f"name it: --column prompt={name}.KEY")


def _reply(value: Any, name: str) -> Any:
    """Return the reply of a run."""
    value = decoded(value)
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        return _reply(value[-1], name)
    if isinstance(value, dict):
        if _is_langchains(value):
            return [_turn(value)]
        if value.get("role") == "assistant":
            return [value]
        for key in ("generations", "choices"):
            if isinstance(value.get(key), list) and value[key]:
                return _reply(value[key][0], f"{name}.{key}")
        if (found := _known_key(value, _REPLY_KEYS)) is not None:
            return _reply(value[found], f"{name}.{found}")
    raise BadRowError(f"no reply is found in {_shown(name, value)}", hint=f"name it: --column completion={name}.KEY")


def _known_key(value: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """Return the first of the usual names that has a value, or the only name there is."""
    lone = next(iter(value)) if len(value) == 1 else None
    return next((key for key in keys if value.get(key)), lone)


def _shown(name: str, value: Any) -> str:
    return f"{name!r} with {', '.join(value)}" if isinstance(value, dict) and value else f"{name!r} ({short(value)})"


def _is_langchains(value: Any) -> bool:
    inner = value.get("kwargs", value.get("data")) if isinstance(value, dict) else None
    return (isinstance(inner, dict) and "content" in inner) or (
        isinstance(value, dict) and value.get("type") in _LANGCHAIN_ROLES and "content" in value
    )


def _turn(value: Any) -> Any:
    """Return a message of LangChain, serialised in any of its ways, in TRL's form; other values unchanged."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
        value = {"type": value[0], "role": value[0], "content": value[1]}
    if not isinstance(value, dict) or ("role" in value and value["role"] not in _LANGCHAIN_ROLES):
        return value
    inner: dict[str, Any] = value.get("kwargs") or value.get("data") or value
    named = value.get("id")
    kind = inner.get("type") or (named[-1].removesuffix("Chunk").removesuffix("Message").lower() if named else None)
    turn = {**inner, "role": _LANGCHAIN_ROLES.get(str(kind or value.get("type")), value.get("role", kind))}
    return {key: item for key, item in turn.items() if key in ("role", "content", "tool_calls", "tool_call_id", "name")}
