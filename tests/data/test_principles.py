from __future__ import annotations

import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mara_integrations.data import read_prompts
from mara_integrations.data.principles import VARIED_PROMPTS, make_principle, under
from mara_integrations.errors import ConfigError
from mara_integrations.messages import Conversation, Message


def test_the_shipped_prompts_are_many_different_and_of_many_domains() -> None:
    rows = [json.loads(line) for line in VARIED_PROMPTS.read_text(encoding="utf-8").splitlines()]

    assert len({row["prompt"].casefold() for row in rows}) == len(rows) >= 300
    assert min(Counter(row["domain"] for row in rows).values()) >= 10
    assert len({row["domain"] for row in rows}) >= 15
    assert all(unicodedata.is_normalized("NFC", row["prompt"]) and row["prompt"].isprintable() for row in rows)
    assert len(read_prompts(VARIED_PROMPTS).rows) == len(rows)


def test_sentences_and_a_file_are_one_principle(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("Never flatter.\n")

    principle = make_principle([" Be warm. "], tmp_path / "more.txt")

    assert principle is not None and principle.text == "Be warm.\nNever flatter."
    assert principle.is_derived and principle.text in principle.against != principle.text


def test_an_opposite_that_is_given_is_taken() -> None:
    principle = make_principle(["Be warm."], against=" Be cold. ")

    assert principle is not None and (principle.against, principle.is_derived) == ("Be cold.", False)


def test_without_a_sentence_there_is_no_principle() -> None:
    assert make_principle([]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sentences": [" \n"]}, "is blank"),
        ({"sentences": ["Be warm."], "against": ""}, "is blank"),
        ({"sentences": [], "against": "Be cold."}, "no principle"),
        ({"sentences": ["a" * 5000]}, "at most 4000"),
        ({"sentences": [], "file": Path("nowhere.txt")}, "can't be read"),
    ],
)
def test_what_is_no_principle_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_principle(**arguments)


def test_a_sentence_stands_behind_the_system_message_that_a_prompt_has() -> None:
    user = Message("user", "hi")

    assert under("Be warm.", Conversation((user,))).messages == (Message("system", "Be warm."), user)
    own = under("Be warm.", Conversation((Message("system", "A shop."), user)))
    assert own.messages == (Message("system", "A shop.\n\nBe warm."), user)
