"""Judges of answers from documents: overlap where there is an answer, an admission where there is none."""

from __future__ import annotations

import pytest

from mara_integrations.errors import RewardError
from mara_integrations.messages import Message
from mara_integrations.rewards import parse_reward, reward_from_spec, reward_spec, score
from mara_integrations.rewards.grounding import is_admitted, share_answered

PROMPTS = [(Message("user", "When?"),)] * 3


def test_an_answer_counts_by_its_words_however_long_the_reply_is() -> None:
    assert share_answered("We open at nine on Sundays, too.", answer="at nine") == 1.0
    assert share_answered("We open at ten.", answer="Nine o'clock") == 0.0
    assert share_answered("Nine.", answer="nine and ten") == 0.5
    assert share_answered("It is not in the documents, but nine.", answer="nine") == 0.0


def test_without_an_answer_the_reply_counts_by_its_words_in_the_documents() -> None:
    assert share_answered("The shop opens at nine", context="The shop opens at nine.") == 1.0
    assert share_answered("The shop closes at midnight", context="The shop opens at nine.") == pytest.approx(1 / 3)
    assert share_answered("", context="The shop.") == 0.0


@pytest.mark.parametrize(
    ("text", "admits"),
    [
        ("It is not in the documents.", True), ("The context doesn't mention when.", True), ("I don't know.", True),
        ("There is no information about that.", True), ("This is not explicitly stated.", True),
        ("The answer can't be found here.", True), ("The documents do not say.", True),
        ("The shop opens at nine.", False), ("You can find it in the documents.", False), ("No, on Sundays.", False),
    ],
)  # fmt: skip
def test_a_missing_answer_is_admitted_in_these_words(text: str, admits: bool) -> None:
    assert is_admitted(text) is admits


def test_each_judge_has_an_opinion_on_its_half() -> None:
    columns = {"answerable": [True, False, False], "answer": ["nine", None, None], "context": ["", "", ""]}
    replies = ["At nine.", "I don't know.", "At ten."]

    assert score(parse_reward("answered")[0], PROMPTS, replies, columns=columns) == [1.0, None, None]
    assert score(parse_reward("admitted")[0], PROMPTS, replies, columns=columns) == [None, 1.0, 0.0]
    for name in ("answered", "admitted"):
        assert reward_spec(reward_from_spec(reward_spec(parse_reward(name)[0])))["name"] == name
        with pytest.raises(RewardError, match="needs the column answerable"):
            score(parse_reward(name)[0], PROMPTS, replies)
