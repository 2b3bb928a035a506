"""Rules beyond words: patterns, ready finders, requirements, reading level, IFEval's instructions."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.errors import ConfigError, MaraError, MissingExtraError, RewardError
from mara_integrations.messages import Message
from mara_integrations.rewards import (
    ForbiddenWords,
    parse_reward,
    parse_rule,
    reward_from_spec,
    reward_spec,
    score,
    takes_partial_text,
)
from mara_integrations.rewards.finders import FINDERS, Spans, find_cards
from mara_integrations.rewards.ifeval import INSTRUCTIONS, follows
from mara_integrations.rewards.reading import count_syllables, reading_grade, sentences

PROMPT = (Message("user", "Hi"),)


def found(find: Callable[[str], Spans], text: str) -> list[str]:
    return [text[start:end] for start, end in find(text)]


def says(text: str, *replies: str, **columns: list[Any]) -> list[float | None]:
    return score(parse_reward(text)[0], [PROMPT] * len(replies), list(replies), columns=columns)


class TestNotation:
    def test_words_patterns_and_ready_rules_are_one_rule(self) -> None:
        rule = parse_rule(["refund", r"re:\d{3}", "rule:email"])
        assert found(rule.violations, "refund 123 a@b.de refunds") == ["refund", "123", "a@b.de"]
        assert rule.described == r"'refund', re:\d{3}, rule:email"
        assert score(rule, [PROMPT] * 2, ["a refund", "fine"]) == [0.0, 1.0] and takes_partial_text(rule)

    def test_more_text_after_a_violation_adds_none(self) -> None:
        rule = parse_rule(["rule:long?words=1", "e"])
        assert len(rule.violations("a e")) == len(rule.violations("a e, f")) == 2

    def test_words_alone_are_forbidden_words(self) -> None:
        assert isinstance(parse_rule(["a", "b"]), ForbiddenWords)

    @pytest.mark.parametrize("texts", [["re:a|b"], ["rule:long?words=3"], ["x*", "re:y"], ["rule:pii", "rule:url"]])
    def test_a_rule_survives_json(self, texts: list[str]) -> None:
        spec = json.loads(json.dumps(reward_spec(parse_rule(texts))))
        again = reward_from_spec(spec)
        assert reward_spec(again) == spec and spec["kind"] == "rules"

    def test_patterns_know_unicode(self) -> None:
        assert found(parse_rule([r"re:\p{Greek}+"]).violations, "a λόγος b") == ["λόγος"]
        assert found(parse_rule([r"re:(?i)straße"]).violations, "STRAßE") == ["STRAßE"]
        assert found(parse_rule([r"re:^\X$"]).violations, "👩‍🚀") == ["👩‍🚀"]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("re:(", "is not a regular expression: missing )"), ("re:", "pattern 're:' is empty"),
            ("re:" + "a" * 2000, "has 2000 characters"), ("rule:mail", "rule 'mail' is unknown"),
            ("rule:pii?kind=x", "rule 'pii' takes nothing; given is kind"), (" ", "forbidden words"),
            ("rule:long?words=few", "rule:long?words=few is not allowed"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_said(self, text: str, said: str) -> None:
        with pytest.raises(MaraError) as caught:
            parse_rule([text])
        assert said in caught.value.message

    @pytest.mark.parametrize("text", ["re:(a|aa)+$", "regex?pattern=(a|aa)%2B$"])
    def test_a_pattern_that_would_never_end_is_stopped(self, text: str) -> None:
        reward = parse_rule([text]) if text.startswith("re:") else parse_reward(text)[0]
        began = time.monotonic()
        with pytest.raises(RewardError, match="took longer than 2 s on a text of 41 characters"):
            score(reward, [PROMPT], ["a" * 40 + "!"])
        assert time.monotonic() - began < 60

    def test_what_is_required_must_appear(self) -> None:
        assert says("required?what=thanks", "Thanks!", "Bye") == [1.0, 0.0]
        assert says("required?what=re:\\d", "I am 7", "no") == [1.0, 0.0]
        spec = reward_spec(parse_reward("required?what=rule:url")[0])
        assert reward_spec(reward_from_spec(spec)) == spec


class TestAsterisks:
    @pytest.mark.parametrize(
        ("word", "text", "said"),
        [
            ("refund*", "Refunds, refundable, a refund; prerefund", ["Refund", "refund", "refund"]),
            ("*berg", "Heidelberg bergs Berg", ["berg", "Berg"]),
            ("*fund*", "the refunds", ["fund"]),
            ("**", "so **bold**", ["**", "**"]),
            ("as an ai*", "As an AIs", ["As an AI"]),
            ("*", "2 * 3", ["*"]),
            ("é*", "e\u0301t", ["e\u0301"]),
        ],
    )
    def test_they_stand_for_letters(self, word: str, text: str, said: list[str]) -> None:
        assert found(ForbiddenWords(word).violations, text) == said


class TestFinders:
    @pytest.mark.parametrize(
        ("name", "text", "said"),
        [
            ("email", "to o'x+1@example.co.uk, bob@müller.de. a@b @you x@", ["o'x+1@example.co.uk", "bob@müller.de"]),
            ("url", "https://a.org/b?c=1. (www.x.org) ftp://d www. a.b", ["https://a.org/b?c=1", "www.x.org", "ftp://d"]),
            ("emoji", "ok 👍🏽 ❤️ 🇩🇪 © 1 #", ["👍🏽", "❤️", "🇩🇪"]),
            ("card", "4111 1111 1111 1111, 378282246310005", ["4111 1111 1111 1111", "378282246310005"]),
            ("card", "4111-1111-1111-1112 1234567890123456 0000000000000000", []),
            ("iban", "DE89 3704 0044 0532 0130 00, DE89370400440532013001", ["DE89 3704 0044 0532 0130 00"]),
            ("phone", "+49 30 1234567 or (555) 123-4567", ["+49 30 1234567", "(555) 123-4567"]),
            ("phone", "555-123-4567, 020 7946 0958, 0170/1234567", ["555-123-4567", "020 7946 0958", "0170/1234567"]),
            ("phone", "2024-01-15, 15.01.2024, 1,000,000, 1990-2020, 3.14159265, 192.168.100.200", []),
            ("pii", "a@b.de 4111111111111111", ["a@b.de", "4111111111111111"]),
            ("markdown", "# A\n- b\n2. c\n> d\n`e` [f](g) **h", ["# ", "- ", "2. ", "> ", "`e`", "[f](g)", "**"]),
            ("markdown", "2*3*4, snake_case_name, a * b * c, 3 - 2, it's", []),
            ("long?words=2", "one two three four", ["three four"]),
            ("long?words=4", "one two three four.", []),
            ("hard-words?syllables=4", "a responsibility to eat", ["responsibility"]),
            ("informal", "It's fine, Ann's dog isn't. Hey! Don’t.", ["It's", "isn't", "Hey", "!", "Don’t"]),
            ("informal", "It is the dog's own. High hats, please. She had let it go.", []),
            ("flattery", "Great question! So.\nWhat a wonderful idea", ["Great question!", "What a wonderful idea"]),
            ("flattery", "Your first poem is truly beautiful. You're so right.", ["Your first poem is truly beautiful",
             "You're so right"]),
            ("flattery", "That's a really great plan, I adore you", ["That's a really great plan", "I adore you"]),
            ("flattery", "A good question to ask is why. You are on the right track. The plan is good enough.", []),
            ("refusal", "I'm sorry, but I can't help. This is illegal", ["I'm sorry, but I can", "This is illegal"]),
            ("refusal", "I cannot assist with that; I must decline", ["I cannot assist", "I must decline"]),
            ("refusal", "I'm sorry that it broke. I can help. You can't park here.", []),
        ],
    )  # fmt: skip
    def test_each_finds_what_it_is_for(self, name: str, text: str, said: list[str]) -> None:
        assert found(parse_rule([f"rule:{name}"]).violations, text) == said

    def test_each_is_a_reward_by_name(self) -> None:
        assert says("no-email", "a@b.de", "none") == [0.0, 1.0]
        assert says("no-long?words=1", "a b", "a") == [0.0, 1.0]
        assert all(says(f"no-{name}", "Yes.") == [1.0] for name in FINDERS)

    @given(st.text(), st.sampled_from(sorted(FINDERS)))
    def test_spans_lie_in_the_text_whatever_it_is(self, text: str, name: str) -> None:
        spans = parse_rule([f"rule:{name}"]).violations(text)
        assert spans == sorted(spans) and all(0 <= start < end <= len(text) for start, end in spans)

    @given(st.integers(0, 10**14 - 1), st.integers(0, 9))
    def test_one_last_digit_of_ten_checks(self, number: int, other: int) -> None:
        stem = f"4{number:014d}"
        assert sum(bool(find_cards(f"{stem}{digit}")) for digit in range(10)) == 1


class TestReading:
    def test_sentences_end_at_marks_but_not_at_short_forms_and_numbers(self) -> None:
        assert sentences("Dr. Lee paid 3.5 dollars. Why? So… J. R. left!") == [
            "Dr. Lee paid 3.5 dollars.", "Why?", "So…", "J. R. left!",
        ]  # fmt: skip
        assert sentences("これは文。二つ目。") == ["これは文。", "二つ目。"] and sentences("...") == []

    def test_syllables_are_counted_by_spelling(self) -> None:
        counted = {"cat": 1, "table": 2, "make": 1, "wanted": 2, "jumped": 1, "houses": 2, "responsibility": 6}
        assert {word: count_syllables(word) for word in counted} == counted

    def test_the_grade_is_kincaids(self) -> None:
        text = "The quick brown fox jumps over the lazy dog."  # 9 words, 11 syllables, one sentence
        assert reading_grade(text) == pytest.approx(0.39 * 9 + 11.8 * 11 / 9 - 15.59)
        assert reading_grade("") == 0.0
        hard = "Institutional heterogeneity necessitates organisational responsibility."
        easy, difficult = says("reading-level?grade=6", "I eat. You eat.", hard)
        assert easy == 0.0 and difficult is not None and difficult < -10


class TestIFEval:
    # one reply that follows and one that does not, by the wording of the data set's prompts
    CASES: tuple[tuple[str, dict[str, Any], str, str], ...] = (
        ("keywords:existence", {"keywords": ["sun", "moon"]}, "Sun and MOON", "the sun"),
        ("keywords:frequency", {"keyword": "the", "frequency": 2, "relation": "at least"}, "The the", "the"),
        ("keywords:forbidden_words", {"forbidden_words": ["you"]}, "young", "You."),
        ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "less than"}, "q", "qQ"),
        ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "One.", "One. Two."),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
        ("length_constraints:number_words", {"num_words": 3.0, "relation": "at least"}, "a b c", "a b"),
        ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
         "a\n\n**So** b", "so\n\na"),
        ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] [town]", "[name]"),
        ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "a\nP.P.S. b", "a\nP.S. b"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
        ("detectable_format:constrained_response", {}, "My answer is maybe.", "Maybe."),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* **b**", "*a* ** **"),
        ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
         "Section 1\na\nSection 2\nb", "Section 1\na"),
        ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
        ("detectable_format:title", {}, "<<A song>>\nla", "<< >>\nla"),
        ("combination:two_responses", {}, "a ****** b", "a ****** a"),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Write a song."}, "write a song. La", "La"),
        ("startend:end_checker", {"end_phrase": "That is all."}, 'a. "That is ALL."', "That is all. a"),
        ("startend:quotation", {}, '"a"', '"a'),
        ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"}, "A b", "A B"),
        ("change_case:english_capital", {}, "ALL OF IT 1.", "ALL of it"),
        ("change_case:english_lowercase", {}, "all of it.", "All of it"),
        ("punctuation:no_comma", {}, "a. b", "a, b"),
    )  # fmt: skip

    @pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES)
    def test_each_instruction_is_checked(self, name: str, arguments: dict[str, Any], good: str, bad: str) -> None:
        assert follows(good, name, {**arguments, "unused": None}) and not follows(bad, name, arguments)

    def test_all_of_the_data_set_are_there(self) -> None:
        assert len(INSTRUCTIONS) == 25 and {case[0] for case in self.CASES} == {
            *INSTRUCTIONS.keys() - {"language:response_language"}
        }

    def test_an_empty_reply_follows_none(self) -> None:
        assert not follows(" ", "punctuation:no_comma")

    def test_rows_of_the_data_set_are_scored_by_the_share_they_follow(self) -> None:
        names = ["punctuation:no_comma", "length_constraints:number_words"]
        arguments = [{"num_words": None}, {"num_words": 2, "relation": "at least", "keyword": None}]
        both = {"instruction_id_list": [names, names, []], "kwargs": [arguments, json.dumps(arguments), []]}
        assert says("ifeval", "a b", "a, b", "a", **both) == [1.0, 0.5, None]

    def test_one_instruction_is_a_reward_by_itself(self) -> None:
        text = "ifeval?instruction=length_constraints:number_words&num_words=2&relation=less%20than"
        assert says(text, "a", "a b") == [1.0, 0.0]
        spec = json.loads(json.dumps(reward_spec(parse_reward(text)[0])))
        assert reward_spec(reward_from_spec(spec)) == spec

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("ifeval?instruction=no_comma", "instruction 'no_comma' is unknown"),
            ("ifeval?instruction=punctuation:no_comma&n=1", "takes nothing; given is n"),
            ("ifeval?instruction=length_constraints:number_words", "takes num_words, relation; given is nothing"),
            ("ifeval?instruction=length_constraints:number_words&num_words=x", "has arguments of another kind"),
            ("ifeval?instruction=length_constraints:number_words&num_words=1&relation=more", "relation 'more'"),
            ("ifeval?num_words=3", "name the instruction, too"),
            ("reading-level?grade=low", "reading-level?grade=low is not allowed"),
        ],
    )
    def test_what_is_wrong_is_said(self, text: str, said: str) -> None:
        with pytest.raises(MaraError) as caught:
            parse_reward(text)
        assert said in caught.value.message

    def test_without_its_column_it_says_so(self) -> None:
        with pytest.raises(RewardError, match="needs the column instruction_id_list"):
            says("ifeval", "a")


class TestLanguage:
    def test_a_reply_in_the_language_is_told(self) -> None:
        pytest.importorskip("py3langid", reason="needs the language extra")
        german, english = "Das Wetter ist heute sehr schön, und wir gehen spazieren.", "We take a walk in the sun."
        good, bad, none = says("language?code=de-AT", german, english, "123")
        assert good is not None and bad is not None and good > 0.9 > 0.1 > bad and none == 0.0
        assert follows(english, "language:response_language", {"language": "en"})
        with pytest.raises(ConfigError, match="language 'xx' is not known"):
            parse_reward("language?code=xx")

    def test_without_a_code_it_is_the_language_of_the_prompt(self) -> None:
        pytest.importorskip("py3langid", reason="needs the language extra")
        german, english = "Das Wetter ist heute sehr schön, und wir gehen spazieren.", "We take a walk in the sun."
        reward, asked = parse_reward("language")[0], "Wie ist das Wetter heute in Berlin?"
        question = (Message("user", asked),)
        for conversational in (False, True):
            same, other = score(reward, [question] * 2, [german, english], conversational=conversational)
            assert same is not None and other is not None and same > 0.9 > 0.1 > other
        chat = (Message("user", "What is the weather like?"), Message("assistant", english), *question)
        assert score(reward, [chat], [german], conversational=True) == [same]
        assert score(reward, [[Message("user", "123?")]], [english]) == [None]

    def test_what_is_not_installed_is_named_with_its_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "py3langid.langid", None)
        with pytest.raises(MissingExtraError) as caught:
            parse_reward("language?code=en")
        assert caught.value.hint == "pip install 'mara-integrations[language]'"
