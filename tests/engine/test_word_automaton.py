from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.engine.word_automaton import START, WordAutomaton
from mara_integrations.rewards.words import ForbiddenWords

# few characters, so that words meet: a letter, its capital, an accent of its own, a sharp s, spaces, edges
ALPHABET = "abAB s\n_.'’+*éßS\u0301"
texts = st.text(ALPHABET, max_size=12)
words = st.lists(st.text("abs é'+*", min_size=1, max_size=5).filter(str.strip), min_size=1, max_size=4)
A_LETTER = "ж"  # of no word


@given(words, texts)
def test_a_word_is_complete_where_no_letter_can_save_it(forbidden: list[str], text: str) -> None:
    rule = ForbiddenWords(forbidden)

    after = WordAutomaton(rule).read(START, text)

    assert (after is None) == bool(rule.violations(text + A_LETTER))
    if after is not None:
        assert after.ends_word == bool(rule.violations(text))


@given(words, texts, st.integers(0, 12))
def test_pieces_read_as_the_whole(forbidden: list[str], text: str, cut: int) -> None:
    automaton = WordAutomaton(ForbiddenWords(forbidden))

    first = automaton.read(START, text[:cut])

    assert (first and automaton.read(first, text[cut:])) == automaton.read(START, text)


@given(words, texts, texts, st.sampled_from(["b", "B.", "s b", "é"]))
def test_what_a_stop_string_leaves_has_no_word(forbidden: list[str], before: str, after: str, stop: str) -> None:
    rule, text = ForbiddenWords(forbidden), before + stop + after

    if WordAutomaton(rule, [stop]).read(START, text) is not None:
        assert not rule.violations(text[: text.index(stop)])


@pytest.mark.parametrize(
    ("word", "text", "is_complete"),
    [
        ("you", "Yeast", False),
        ("you", "You", False),  # may become "Your"
        ("you", "You ", True),
        ("you", "your", False),
        ("you", "bayou ", False),
        ("as an AI", "As  an\nai.", True),
        ("as an AI", "as an aid.", False),
        ("c++", "C++", True),  # no letter can go on with it
        ("strasse", "Straße!", True),
        ("don't", "don’t ", True),
        ("refund*", "a refund", True),  # whatever letters go on with it
        ("refund*", "refun", False),
        ("*berg", "Heidelberg ", True),
    ],
)
def test_whole_words_in_any_case(word: str, text: str, is_complete: bool) -> None:
    assert (WordAutomaton(ForbiddenWords(word)).read(START, text) is None) == is_complete


def test_a_state_stays_small_however_long_the_text() -> None:
    automaton = WordAutomaton(ForbiddenWords(["aaaaaaaa b", "a a a"]))

    state = automaton.read(START, "a a aaaaa" * 500)

    assert state is None or len(state.begun) <= 16
