from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
import regex
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mara_integrations.engine.patterns.alphabet import Alphabet
from mara_integrations.engine.patterns.automaton import PatternAutomaton, check_patterns
from mara_integrations.engine.patterns.tree import ANY, Characters
from mara_integrations.errors import ConfigError
from mara_integrations.rewards.finders import PATTERNS
from mara_integrations.rewards.rules import TextRule, parse_rule

LETTERS = "abB \n-éж"  # what patterns and texts have; the last one is in no pattern
texts = st.text(LETTERS, max_size=7)

characters = st.sampled_from(
    ["a", "b", "B", "é", " ", r"\n", "-", ".", r"\w", r"\W", r"\s", "[ab]", "[^a]", r"[\w-]", r"\p{L}", r"\x61", "[]a]"]
)
looks = st.sampled_from(
    [r"\b", r"\B", r"\A", r"\Z", "^", "$", "(?m:^)", "(?m:$)", r"(?=\w)", "(?!a)", "(?<=b)", r"(?<![\w-])", r"(?=a|\s)"]
)
signs = st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{,2}", "{2,}", "*?", "+?", "++", "*+", "?+", "{1,2}+"])


def grown(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.lists(parts, min_size=2, max_size=3).map("".join),
        st.lists(parts, min_size=2, max_size=2).map(lambda branches: f"(?:{'|'.join(branches)})"),
        st.tuples(parts, signs).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        parts.map(lambda part: f"(?i:{part})"),
        parts.map(lambda part: f"({part})"),
    )


one_character = st.tuples(characters, signs).map("".join)
patterns = st.recursive(st.one_of(characters, characters, one_character, looks), grown, max_leaves=6)


def may_stay_free(has_match: Callable[[str], bool], text: str, depth: int) -> bool:
    """Whether a text of at most so many more characters has no match."""
    mores = (more for size in range(depth + 1) for more in itertools.product(LETTERS, repeat=size))
    return any(not has_match(text + "".join(more)) for more in mores)


def read(automaton: PatternAutomaton, text: str) -> int | None:
    """The length of the text that completes a match; None: it may stay free."""
    state = automaton.start
    for length, character in enumerate(text, start=1):
        after = automaton.read(state, character)
        if after is None:
            return length
        state = after
    return None


@settings(max_examples=150)
@given(patterns, texts)
def test_a_match_is_complete_where_no_text_can_undo_it(pattern: str, text: str) -> None:
    try:
        automaton = PatternAutomaton(f"re:{pattern}", common=LETTERS)
    except ConfigError:  # no regular expression, matches nothing at all, or can't be followed
        assume(False)
    compiled = regex.compile(pattern)

    def has_match(text: str) -> bool:
        return any(match.end() > match.start() for match in compiled.finditer(text))

    length = read(automaton, text)

    if length is not None:
        assert not may_stay_free(has_match, text[:length], 2)
        text = text[: length - 1]
    assert may_stay_free(has_match, text, 4)
    state = automaton.read(automaton.start, text)
    assert state is not None and automaton.ends(state) == has_match(text)


@given(patterns, texts, st.integers(0, 7))
def test_pieces_read_as_the_whole(pattern: str, text: str, cut: int) -> None:
    try:
        automaton = PatternAutomaton(f"re:{pattern}", common=LETTERS)
    except ConfigError:
        assume(False)

    first = automaton.read(automaton.start, text[:cut])

    assert (first and automaton.read(first, text[cut:])) == automaton.read(automaton.start, text)


@given(texts, texts, st.sampled_from(["b", "B-", " b", "é"]))
def test_what_a_stop_string_leaves_has_no_match(before: str, after: str, stop: str) -> None:
    automaton, text = PatternAutomaton(r"re:\ba+\b", [stop], LETTERS), before + stop + after

    if automaton.read(automaton.start, text) is not None:
        assert not regex.search(r"\ba+\b", text[: text.index(stop)])


SAMPLES = [
    "Write to jane.o'neil@mail.example.co, or to nobody@home.",
    "See https://example.com/a(b)?x=1. Or www.example.com, or www. alone.",
    "**Bold**, *it*, `code` and\n# Heading\n- item\n1. one\n| a | b |\n---\n> quoted [a](b) snake_case_name 2*3*4 _x_",
    "Nice \U0001f600 and ❤️, not © or 7.",
    "Call +49 30 123456-78, (030) 1234567, 555-1234 or 2024-01-15, 1995-2001, 3.14159265358979.",
    "Card 4111 1111 1111 1111, 4111 1111 1111 1112, 5500-0000-0000-0004 and 378282246310005.",
    "IBAN DE89 3704 0044 0532 0130 00 or DE89370400440532013001, GB82WEST12345698765432.",
    "Nothing: the year 1984, $12.50, room 101, a@b, x_y.",
]


@pytest.mark.parametrize("name", ["email", "url", "emoji", "markdown"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_ready_rules_without_a_check_find_what_they_find_in_a_whole_text(name: str, sample: str) -> None:
    automaton, rule = PatternAutomaton(f"rule:{name}", common="".join(SAMPLES)), TextRule(f"rule:{name}")

    length = read(automaton, sample)

    free = sample if length is None else sample[: length - 1]
    state = automaton.read(automaton.start, free)
    assert state is not None and automaton.ends(state) == bool(rule.violations(free))
    assert length is None or (rule.violations(sample[:length]) and rule.violations(sample[:length] + " a"))


@given(st.text("0124 -+(/.a", max_size=24), st.sampled_from(["phone", "card", "iban", "pii"]))
def test_what_is_read_as_free_of_numbers_has_none(text: str, name: str) -> None:
    automaton = PatternAutomaton(f"rule:{name}", common="0123456789 -+(/.a")

    state = automaton.read(automaton.start, text)

    if state is not None and not automaton.ends(state):
        assert not parse_rule([f"rule:{name}"]).violations(text)


@pytest.mark.parametrize(
    ("notation", "text", "free"),
    [
        ("re:ab", "xab", 2),
        (r"re:\bas an AI\b", "as an AI,", 8),
        (r"re:\bas an AI\b", "as an AIs", 9),
        (r"re:\w+@\w+\b", "me@h", 3),  # whatever follows: a longer word is one, too
        ("re:(?i)straße", "STRASSE", 7),  # one letter for one: as `regex` compares
        ("re:(?i)é+!", "ÉÉ!", 2),
        ("rule:card", "4111 1111 1111 1111.", 19),  # only the next character says that it has no more digits
        ("rule:card", "4111 1111 1111 1112.", 20),  # Luhn's formula does not hold
        ("rule:pii", "DE89 3704 0044 0532 0130 00 ", 19),  # from "0044 0532" on, a number of a telephone
        ("rule:email", "a@b.co", 5),
        ("rule:url", "See https://a", 12),
    ],
)
def test_where_a_text_is_no_longer_free(notation: str, text: str, free: int) -> None:
    length = read(PatternAutomaton(notation, common=text + LETTERS), text)

    assert (len(text) if length is None else length - 1) == free


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        (r"(a)\1", r"a back reference, \\1"),
        ("(?P<x>a)(?P=x)", "a back reference"),
        ("a(?R)?", "a group of another kind"),
        ("(?=ab)c", "a look ahead at more than one character"),
        ("(?<!ab)c", "a look back at more than one character"),
        ("(?>ab|a)b", "an atomic group"),
        ("(?:ab|a)++b", "a possessive group"),
        ("a$b", r"\$ before its end"),
        (r"\Xa", r"\\X"),
        ("(?:ab){e<=1}", r"'\{e<=1\}'"),
        ("(?V1)[a--b]", "other flags than"),
        ("a(?w:b)", "the flag 'w'"),
        ("ab(?i)c", "a group of another kind"),
        ("a*", "matches where there is no text"),
        (r"\b", "matches where there is no text"),
        ("(?:a|)+", "matches where there is no text"),
        ("a{300}", "is too large"),
        ("(?:(?:a{9}){9}){9}", "is too large"),
        ("(?:a?){1000}b", "is too large"),
        ("(" * 40 + "a" + ")" * 40, "more than 30 groups"),
        ("a(", "is not a regular expression"),
        ("", "is empty"),
    ],
)
def test_what_cant_be_followed_is_refused_by_name(pattern: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        check_patterns([f"re:{pattern}"])


def test_rules_that_are_no_pattern_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'rule:long' judges a text") as refused:
        check_patterns(["rule:long"])
    assert set(PATTERNS) <= set(str(refused.value.hint).replace(",", "").split())
    with pytest.raises(ConfigError, match="rule 'emails' is unknown"):
        check_patterns(["rule:emails"])
    with pytest.raises(ConfigError, match="never has 17 patterns"):
        check_patterns([f"re:a{number}" for number in range(17)])


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:a+)+b",
        "(?:a|a)+b",
        "(?:a?){100}a{100}b",
        "(?:a|b).{200}c",
        "(?:.*a){10}b",
        "(?:(?:){1000000000}){1000000000}a",
        "(?:a{0,8}){0,8}b",
    ],
)
def test_a_hostile_pattern_is_read_in_bounded_time(pattern: str) -> None:
    began = time.process_time()

    automaton = PatternAutomaton(f"re:{pattern}", common="abc")
    automaton.read(automaton.start, "ab" * 500 + "a" * 500)

    assert time.process_time() - began < 5


@given(st.lists(characters.filter(lambda one: one != "."), max_size=4), st.text(max_size=20), st.booleans())
def test_symbols_of_a_text_are_those_of_its_characters(sources: list[str], text: str, is_single: bool) -> None:
    sets = [ANY, *(Characters(source, regex.IGNORECASE) for source in sources)]
    alphabet = Alphabet(sets, [1] if is_single and sources else [], LETTERS)
    found = alphabet.symbols_of(text + LETTERS)
    assert found == frozenset(alphabet.read(text + LETTERS))
