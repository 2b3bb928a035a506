"""Converts TRL's data set types to rows: preference, unpaired preference, prompt-completion, prompt-only, messages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mara_integrations.data.conversations import messages_of, text_of, tools_of
from mara_integrations.data.records import BadRowError, Fields, Record, short
from mara_integrations.data.rows import Kind, Labelled, Pair, PromptRow, Row
from mara_integrations.errors import DataError
from mara_integrations.messages import Message

_NOUNS: dict[Kind, str] = {"pairs": "a pair", "labelled": "a labelled reply", "prompts": "a prompt row"}
_NEEDS: dict[Kind, str] = {
    "pairs": f"{_NOUNS['pairs']} needs prompt, chosen, rejected",
    "labelled": f"{_NOUNS['labelled']} needs prompt, completion, label",
    "prompts": f"{_NOUNS['prompts']} needs prompt",
}
WANTED = "pairs have prompt, chosen, rejected; labelled replies have prompt, completion, label; prompts have prompt"
_NAMES = frozenset({"prompt", "chosen", "rejected", "completion", "label", "messages"})
_UP = frozenset({"true", "1", "1.0", "+1", "good", "yes", "up", "thumbs up", "thumbs_up", "👍"})
_DOWN = frozenset({"false", "0", "0.0", "-1", "-1.0", "bad", "no", "down", "thumbs down", "thumbs_down", "👎"})


def _pair(fields: Fields, source: str) -> Pair:
    chosen, rejected = need(fields, "chosen", "pairs"), need(fields, "rejected", "pairs")
    if type(chosen) is not type(rejected):
        raise BadRowError("'chosen' and 'rejected' differ in form", hint="both strings, or both lists of messages")
    # TRL: a string prompt beside whole conversations is a copy of what these already hold.
    whole = isinstance(chosen, list) and (len(chosen) > 1 or len(rejected) > 1)
    if "prompt" not in fields or (whole and isinstance(fields["prompt"], str)):
        prompt, chosen, rejected = _implicit_prompt(chosen, rejected)
    else:
        prompt = fields["prompt"]
    tools = tools_of(fields.get("tools"))
    return Pair(_prompt(prompt), _reply("chosen", chosen), _reply("rejected", rejected), source, tools)


def _labelled(fields: Fields, source: str) -> Labelled:
    prompt, completion, label = (need(fields, name, "labelled") for name in ("prompt", "completion", "label"))
    tools = tools_of(fields.get("tools"))
    return Labelled(_prompt(prompt), _reply("completion", completion), label_of(label), source, tools)


def _prompt_row(fields: Fields, source: str) -> PromptRow:
    if "prompt" not in fields and "messages" in fields:
        fields = _conversation(fields)
    columns = {name: value for name, value in fields.items() if name not in ("prompt", "tools")}
    return PromptRow(_prompt(need(fields, "prompt", "prompts")), columns, source, tools_of(fields.get("tools")))


READERS: dict[Kind, Callable[[Fields, str], Row]] = {"pairs": _pair, "labelled": _labelled, "prompts": _prompt_row}


def _conversation(fields: Fields) -> Fields:
    """Return a conversation as a prompt; an assistant's turn at its end becomes the completion."""
    turns = fields["messages"]
    rest = {name: value for name, value in fields.items() if name != "messages"}
    last = turns[-1] if isinstance(turns, list) and len(turns) > 1 else None
    if isinstance(last, dict) and last.get("role") == "assistant":
        return {"prompt": turns[:-1], "completion": turns[-1:], **rest}
    return {"prompt": turns, **rest}


def need(fields: Fields, name: str, kind: Kind) -> Any:
    """Return a field that rows of this kind must have."""
    if name not in fields:
        found = f"the row has {', '.join(fields)}" if fields else "the row has no field"
        raise BadRowError(f"{name!r} is missing; {_NEEDS[kind]}", hint=found)
    return fields[name]


def _implicit_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Return the common beginning of two replies as the prompt, in whole words, and the rests of both."""
    if not isinstance(chosen, list):
        chosen, rejected = text_of("chosen", chosen), text_of("rejected", rejected)
    if chosen == rejected:
        raise BadRowError(
            "'chosen' and 'rejected' are the same, so no prompt can be told from them", hint=_NEEDS["pairs"]
        )
    end = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    end = min(len(chosen), len(rejected)) if end is None else end
    if isinstance(chosen, str):
        # TRL cuts within a word too ("bl" before "ue" and "ack"), where no reply of a chat model starts.
        last_word = re.search(r"\s+\S*$", chosen[:end])
        end = last_word.start() if last_word else 0
    if not chosen[:end]:
        raise BadRowError("'prompt' is missing, and 'chosen' and 'rejected' begin differently", hint=_NEEDS["pairs"])
    return chosen[:end], chosen[end:], rejected[end:]


def _prompt(value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message("user", text_of("prompt", value)),)
    messages = messages_of("prompt", value)
    if messages[-1].role not in ("user", "tool"):
        raise BadRowError(
            f"'prompt' ends with a message of the {messages[-1].role}",
            hint="it must end with the user's, or with a tool's result",
        )
    return messages


def _reply(name: str, value: Any) -> str:
    if isinstance(value, str):
        return text_of(name, value).lstrip()
    messages = messages_of(name, value)
    roles = [message.role for message in messages]
    if roles != ["assistant"]:
        raise BadRowError(
            f"{name!r} has messages of {', '.join(roles)}", hint="a reply is one message of the assistant"
        )
    if messages[0].tool_calls:
        raise BadRowError(
            f"{name!r} calls tools", hint="a reply is text; calls may stand in the prompt's earlier turns"
        )
    return messages[0].content


def label_of(value: Any) -> bool:
    """Return a label as a bool, in any of the ways that labels are written.

    Raises:
        BadRowError: If it is not a label.
    """
    word = str(value).strip().lower()
    if word in _UP or word in _DOWN:
        return word in _UP
    raise BadRowError(
        f"'label' is {short(value)}",
        hint="labels are true or false, 1 or 0, good or bad, yes or no, up or down, 👍 or 👎; "
        "--column 'label=NAME>=4' makes labels of ratings",
    )


def infer_kind(path: Path, records: Sequence[Record]) -> Kind:
    """Return the kind of rows that the columns of every readable row allow.

    Raises:
        DataError: If rows are of several kinds or of none; names a row.
    """
    # Replies of which none has a label are examples, not preferences.
    has_labels = any(isinstance(record, dict) and "label" in record for _, record in records)
    first: dict[Kind, int] = {}
    for line, record in records:
        if isinstance(record, dict):
            if "chosen" in record or "rejected" in record:
                first.setdefault("pairs", line)
            elif "completion" in record and has_labels:
                first.setdefault("labelled", line)
            elif "prompt" in record or "messages" in record:
                first.setdefault("prompts", line)
    # A row with a prompt and nothing else among pairs is a pair that lacks its replies, and is reported as that.
    if len(first) > 1:
        first.pop("prompts", None)
    if len(first) > 1:
        (kind, line), (other, other_line) = sorted(first.items(), key=lambda item: item[1])
        raise DataError(
            f"{path}:{other_line}: this row is {_NOUNS[other]}, row {line} is {_NOUNS[kind]}",
            hint="put each kind in its own file",
        )
    if first:
        return next(iter(first))
    line, record = next(((line, record) for line, record in records if isinstance(record, dict)), records[0])
    if isinstance(record, BadRowError):  # no row is readable
        raise DataError(f"{path}:{line}: {record} (none of {len(records)} rows can be read)", hint=record.hint)
    near = [f"--column {shlex.quote(f'{str(key).lower()}={key}')}" for key in record if str(key).lower() in _NAMES]
    raise DataError(
        f"{path}:{line}: the columns {', '.join(map(repr, record)) or '(none)'} are of no known kind",
        hint=f"{WANTED}; {' '.join(near) or '--column prompt=NAME'} reads columns of other names",
    )
