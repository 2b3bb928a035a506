from __future__ import annotations

import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mara_integrations.data import read_prompts
from mara_integrations.data.principles import VARIED_PROMPTS, make_principle, notations, under
from mara_integrations.errors import ConfigError
from mara_integrations.messages import Conversation, Message


def test_the_shipped_prompts_are_many_different_and_of_many_domains() -> None:
    rows = [json.loads(line) for line in VARIED_PROMPTS.read_text(encoding="utf-8").splitlines()]

    assert len({row["prompt"].casefold() for row in rows}) == len(rows) >= 300
    assert min(Counter(row["domain"] for row in rows).values()) >= 10
    assert len({row["domain"] for row in rows}) >= 15
    assert all(unicodedata.is_normalized("NFC", row["prompt"]) and row["prompt"].isprintable() for row in rows)
    assert len(read_prompts(VARIED_PROMPTS).rows) == len(rows)


@pytest.mark.parametrize("name", ["opinion", "delicate", "contact"])
def test_the_prompts_of_recipes_are_different_and_not_among_the_others(name: str) -> None:
    file = VARIED_PROMPTS.with_name(f"{name}_prompts.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    varied = {json.loads(line)["prompt"] for line in VARIED_PROMPTS.read_text(encoding="utf-8").splitlines()}

    assert len({row["prompt"].casefold() for row in rows} - varied) == len(rows) == 64
    assert all(unicodedata.is_normalized("NFC", row["prompt"]) and row["prompt"].isprintable() for row in rows)
    assert name != "delicate" or sum(row["harmful"] for row in rows) == 32


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


def test_sentences_with_weights_are_read_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("Use x=5")

    principle = make_principle(["Be warm. = 2", "Never flatter."], tmp_path / "more.txt")

    assert principle is not None and principle.text == "Be warm.\nNever flatter.\nUse x=5"
    assert principle.parts == (("Be warm.", 2.0), ("Never flatter.", 1.0), ("Use x=5", 1.0))
    assert principle.described == "2 × Be warm.\n1 × Never flatter.\n1 × Use x=5"


@pytest.mark.parametrize("sentence", ["Be warm.", "Answer as x=5.", "Set a=b", "Write f(x)=y.", "Say: 1 + 1 = 2!"])
def test_a_sentence_without_a_weight_is_read_as_it_is(sentence: str) -> None:
    principle = make_principle([sentence])

    assert principle is not None and principle.parts == ((sentence, 1.0),) and not principle.weighted


def test_python_code_gives_sentences_or_pairs() -> None:
    assert notations("Be warm.") == ("Be warm.",) and notations(()) == ()
    assert notations(("Be warm.", 0.5)) == ("Be warm.=0.5",)
    assert notations([("Be warm.", 2), "Be brief."]) == ("Be warm.=2", "Be brief.")
    assert notations(("Be warm.", "Be brief.")) == ("Be warm.", "Be brief.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sentences": [" \n"]}, "is blank"),
        ({"sentences": ["Be warm."], "against": ""}, "is blank"),
        ({"sentences": [], "against": "Be cold."}, "no principle"),
        ({"sentences": ["a" * 5000]}, "at most 4000"),
        ({"sentences": [], "file": Path("nowhere.txt")}, "can't be read"),
        ({"sentences": ["Be warm.=0"]}, "'Be warm.=0': weight '0' is not allowed"),
        ({"sentences": ["Be warm.=-1"]}, "weight '-1' is not allowed"),
        ({"sentences": ["Be warm=nan"]}, "weight 'nan' is not allowed"),
        ({"sentences": ["Be warm.=0,5"]}, "weight '0,5' is not allowed"),
        ({"sentences": ["Be warm.="]}, "weight '' is not allowed"),
        ({"sentences": ["=2"]}, "is blank"),
        ({"sentences": ["Be warm.=2"], "against": "Be cold."}, "not allowed beside sentences with weights"),
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
