"""What a reward function is given, what it may return, how it is found, and what a forbidden word is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.errors import ConfigError, RewardError
from mara_integrations.messages import Message
from mara_integrations.rewards import (
    ForbiddenWords,
    Reward,
    Rule,
    load_reward,
    reward_from_spec,
    reward_name,
    reward_spec,
    score,
)

PROMPTS = [(Message("user", "Hi"),), (Message("user", "Bye"),)]
REPLIES = ["Hello!", "See you."]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


class TestWhatARewardIsGiven:
    def test_standard_data_comes_as_strings(self) -> None:
        def echo(prompts: list[str], completions: list[str]) -> list[float]:
            assert (prompts, completions) == (["Hi", "Bye"], REPLIES)
            return [1.0, 2.0]

        assert score(echo, PROMPTS, REPLIES) == [1.0, 2.0]

    def test_conversational_data_comes_as_messages(self) -> None:
        def echo(prompts: list[Any], completions: list[Any]) -> list[float]:
            assert prompts[0] == [{"role": "user", "content": "Hi"}]
            assert completions[1] == [{"role": "assistant", "content": "See you."}]
            return [1.0, 2.0]

        assert score(echo, PROMPTS, REPLIES, conversational=True) == [1.0, 2.0]

    def test_a_function_gets_only_what_it_names(self) -> None:
        def right(completions: list[str], answer: list[str], absent: str = "default") -> list[float]:
            return [float(answer[i] in text and absent == "default") for i, text in enumerate(completions)]

        scores = score(
            right, PROMPTS, REPLIES, completion_ids=[[1], [2]], columns={"answer": ["Hello", "?"], "x": [0, 0]}
        )
        assert scores == [1.0, 0.0]

    def test_a_function_that_takes_all_gets_ids_and_columns(self) -> None:
        def lengths(completion_ids: list[list[int]], **rest: Any) -> list[int]:
            assert sorted(rest) == ["completions", "prompts", "topic"]
            return [len(ids) for ids in completion_ids]

        assert score(lengths, PROMPTS, REPLIES, completion_ids=[[1], [2, 3]], columns={"topic": ["a", "b"]}) == [
            1.0,
            2.0,
        ]

    def test_a_column_that_the_data_lacks_is_named_before_the_call(self) -> None:
        def right(completions: list[str], answer: list[str]) -> list[float]:
            raise AssertionError("must not be called")

        with pytest.raises(RewardError, match="'right' takes 'answer', which the data does not have") as caught:
            score(right, PROMPTS, REPLIES, columns={"anwser": ["a", "b"]})
        assert caught.value.hint == "it has anwser, prompts, completions"

    def test_a_coroutine_function_is_awaited(self) -> None:
        async def brand(completions: list[str]) -> list[float]:
            return [float(len(text)) for text in completions]

        assert score(brand, PROMPTS, REPLIES) == [6.0, 8.0]

    async def test_it_is_awaited_where_an_event_loop_runs_already_too(self) -> None:
        async def brand(completions: list[str]) -> list[float]:
            return [float(len(text)) for text in completions]

        assert score(brand, PROMPTS, REPLIES) == [6.0, 8.0]

    def test_it_is_called_once_a_batch_and_not_for_an_empty_one(self) -> None:
        calls: list[int] = []

        def count(completions: list[str]) -> list[float]:
            calls.append(len(completions))
            return [0.0] * len(completions)

        assert score(count, [], []) == []
        score(count, PROMPTS, REPLIES)
        assert calls == [2]


class _Array:
    """What a numpy array or a tensor looks like from here."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def tolist(self) -> list[Any]:
        return self.values


class TestWhatARewardReturns:
    @pytest.mark.parametrize(
        ("returned", "scores"),
        [
            ([1, None], [1.0, None]),
            ((True, False), [1.0, 0.0]),
            (_Array([0.5, -2.0]), [0.5, -2.0]),
        ],
    )
    def test_numbers_are_floats_and_none_is_no_opinion(self, returned: Any, scores: list[float | None]) -> None:
        assert score(lambda completions: returned, PROMPTS, REPLIES) == scores

    @pytest.mark.parametrize("returned", [[1.0], [1.0, 2.0, 3.0], []])
    def test_another_number_of_scores_is_refused_with_both_counts(self, returned: list[float]) -> None:
        with pytest.raises(RewardError, match=f"returned a list of length {len(returned)} for 2 completions"):
            score(lambda completions: returned, PROMPTS, REPLIES)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", [1.0], {}])
    def test_what_is_no_finite_number_is_refused_with_its_place(self, value: Any) -> None:
        with pytest.raises(RewardError) as caught:
            score(lambda completions: [1.0, value], PROMPTS, REPLIES)
        assert f"returned {value!r} at index 1, for the reply 'See you.'" in caught.value.message

    @pytest.mark.parametrize("returned", [None, 1.0, "good", {"a": 1}])
    def test_what_is_no_list_is_refused(self, returned: Any) -> None:
        with pytest.raises(RewardError, match=f", of type {type(returned).__name__}"):
            score(lambda completions: returned, PROMPTS, REPLIES)

    def test_a_reward_that_raises_is_named_with_its_inputs_and_its_line(self) -> None:
        def brand(completions: list[str]) -> list[float]:
            raise KeyError("tone")

        with pytest.raises(RewardError) as caught:
            score(brand, PROMPTS, ["x" * 1000, "y"])

        assert caught.value.message.startswith("reward 'brand' raised KeyError: 'tone' (batch of 2; first: prompt 'Hi'")
        assert len(caught.value.message) < 200
        assert f"{__file__}:" in (caught.value.hint or "")
        assert isinstance(caught.value.__cause__, KeyError)


class TestLoading:
    @pytest.mark.parametrize("path", ["rewards.py:brand", "rewards:brand", "./rewards.py:brand"])
    def test_a_function_is_found_in_the_current_folder(self, folder: Path, path: str) -> None:
        (folder / "rewards.py").write_text("def brand(completions, **kw):\n    return [1.0 for _ in completions]\n")
        reward = load_reward(path)
        assert score(reward, PROMPTS, REPLIES) == [1.0, 1.0]
        assert reward_name(reward) == "brand" and reward_spec(reward) == {"kind": "function", "path": path}

    def test_a_files_neighbours_can_be_imported_and_its_dataclasses_work(self, folder: Path) -> None:
        (folder / "app").mkdir()
        (folder / "app" / "tone_words.py").write_text("GOOD = 'Hello'\n")
        (folder / "app" / "rewards.py").write_text(
            "from __future__ import annotations\n"
            "from dataclasses import dataclass\n"
            "from tone_words import GOOD\n"
            "@dataclass\n"
            "class Tone:\n"
            "    word: str\n"
            "    def __call__(self, completions):\n"
            "        return [self.word in text for text in completions]\n"
            "tone = Tone(GOOD)\n"
        )
        assert score(load_reward("app/rewards.py:tone"), PROMPTS, REPLIES) == [1.0, 0.0]

    def test_a_dotted_module_is_imported(self) -> None:
        assert load_reward("json:dumps").__wrapped__ is json.dumps

    @pytest.mark.parametrize(
        ("path", "said", "hint"),
        [
            ("brand", "is not of the form module:function", "for example rewards.py:brand"),
            ("rewards:", "is not of the form module:function", "for example rewards.py:brand"),
            ("reward:brand", "no module 'reward'", "did you mean rewards?"),
            ("reward.py:brand", "no file 'reward.py'", "did you mean rewards.py?"),
            ("absent_package.inner:brand", "no module 'absent_package.inner'", "it is neither installed nor"),
            ("rewards:brnad", "rewards has no 'brnad'", "did you mean brand or Brand?"),
            ("rewards:xyz", "rewards has no 'xyz'", "it has Brand, brand"),
            ("rewards:WORDS", "is a list, not a function", "name a function"),
            ("rewards:Brand", "is a class, not a function", "name a function"),
            ("late:brand", "its module fails with ModuleNotFoundError: No module named 'absent_package'", ""),
            ("late.py:brand", "its module fails with ModuleNotFoundError: No module named 'absent_package'", ""),
            ("broken.py:brand", "its module fails with SyntaxError", ""),
        ],
    )
    def test_what_can_not_be_loaded_is_said_with_a_hint(self, folder: Path, path: str, said: str, hint: str) -> None:
        (folder / "rewards.py").write_text("WORDS = []\nclass Brand: ...\ndef brand(completions): ...\n")
        (folder / "late.py").write_text("import absent_package\n")
        (folder / "broken.py").write_text("def brand(:\n")

        with pytest.raises(RewardError) as caught:
            load_reward(path)

        assert f"reward {path!r}" in caught.value.message
        assert said in caught.value.message
        assert hint in (caught.value.hint or "")


class TestForbiddenWords:
    @pytest.mark.parametrize(
        ("word", "text", "found"),
        [
            ("you", "You see", ["You"]),
            ("you", "young youth, bayou", []),
            ("you", "you're here", ["you"]),  # a word ends where letters do
            ("you", "*you* and _you_", ["you", "you"]),
            ("you", "I saw you", ["you"]),
            ("über", "ÜBER uns, darüber", ["ÜBER"]),
            ("of course", "Of  course!\nof\ncourse", ["Of  course", "of\ncourse"]),
            ("don't", "I don\u2019t, you don't", ["don\u2019t", "don't"]),
            ("c++", "C++ and c+", ["C++"]),
            ("!", "Oh! No", ["!"]),
            ("a.b", "axb a.b", ["a.b"]),
            ("größe", "Die Größe, GRÖSSE", ["Größe", "GRÖSSE"]),  # casefolding makes two letters of one
            ("Straße", "Die Straße ist lang.", ["Straße"]),
            ("İstanbul", "in İstanbul", ["İstanbul"]),
            ("\ufb01ne", "a \ufb01ne day, fine", ["\ufb01ne", "fine"]),
            ("fine", "a \ufb01ne day", ["\ufb01ne"]),
            ("i", "İstanbul", []),  # folded, its dot is a character of its own
            ("über", "u\u0308ber", ["u\u0308ber"]),  # accents may be characters of their own
            ("u", "u\u0308ber u", ["u"]),
        ],
    )
    def test_whole_words_are_found_in_any_case(self, word: str, text: str, found: list[str]) -> None:
        assert [text[start:end] for start, end in ForbiddenWords(word).violations(text)] == found

    def test_a_word_within_a_phrase_is_a_violation_of_its_own(self) -> None:
        assert ForbiddenWords(["you know", "you"]).violations("As you know") == [(3, 6), (3, 11)]

    def test_spellings_of_one_word_are_one_word(self) -> None:
        assert ForbiddenWords(["Straße", "STRASSE"]).words == ("straße",)

    def test_as_a_reward_it_gives_1_to_a_reply_that_complies(self) -> None:
        reward: Reward = ForbiddenWords(["you"])
        assert score(reward, PROMPTS, REPLIES) == [1.0, 0.0]
        assert score(reward, PROMPTS, REPLIES, conversational=True) == [1.0, 0.0]

    def test_it_is_a_rule(self) -> None:
        rule: Rule = ForbiddenWords(["you"])
        assert rule.violations("") == []

    @pytest.mark.parametrize("words", [[], "", ["you", " "]])
    def test_no_word_and_blank_words_are_refused(self, words: Any) -> None:
        with pytest.raises(ConfigError, match="forbidden words"):
            ForbiddenWords(words)

    @given(st.text(), st.text("ab '", min_size=1).filter(str.strip))
    def test_the_violations_are_what_a_look_at_every_span_finds(self, text: str, word: str) -> None:
        text, plain = f"{text} {word} {text}", " ".join(word.split())

        def stands_at(start: int, end: int) -> bool:
            before, after = text[:start][-1:], text[end:][:1]
            return not (plain[0].isalnum() and before.isalnum()) and not (plain[-1].isalnum() and after.isalnum())

        for start, end in (spans := ForbiddenWords(word).violations(text)):
            assert " ".join(text[start:end].replace("\u2019", "'").split()).casefold() == plain
            assert stands_at(start, end)
        assert spans


class TestDescriptions:
    def test_a_rule_survives_json(self) -> None:
        spec = json.loads(json.dumps(reward_spec(ForbiddenWords(["You", "of  course"]))))
        assert spec == {"kind": "forbidden_words", "words": ["you", "of course"]}
        rule = reward_from_spec(spec)
        assert score(rule, PROMPTS, REPLIES) == [1.0, 0.0]
        assert reward_spec(rule) == spec

    def test_a_function_survives_json(self) -> None:
        spec = json.loads(json.dumps(reward_spec(load_reward("json:dumps"))))
        assert spec == reward_spec(json.dumps) == {"kind": "function", "path": "json:dumps"}
        assert reward_spec(reward_from_spec(spec)) == spec

    def test_an_unknown_kind_is_refused(self) -> None:
        with pytest.raises(RewardError, match="'oracle' is unknown"):
            reward_from_spec({"kind": "oracle"})

    def test_a_description_without_its_words_is_refused(self) -> None:
        with pytest.raises(RewardError, match="lacks 'words'"):
            reward_from_spec({"kind": "forbidden_words"})
