from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.replies.reasoning import ThoughtSplitter


def split(pieces: list[str], is_open: bool = False) -> tuple[str, str]:
    splitter, thoughts, answer = ThoughtSplitter(is_open), "", ""
    for i, piece in enumerate(pieces):
        new = splitter.push(piece, final=i == len(pieces) - 1)
        thoughts, answer = thoughts + new[0], answer + new[1]
    return thoughts, answer


@pytest.mark.parametrize(
    ("reply", "is_open", "expected"),
    [
        ("<think>\nA cat?\n</think>\n\nYes.\n", False, ("A cat?", "Yes.\n")),
        ("A cat?\n</think>\n\nYes.", True, ("A cat?", "Yes.")),
        ("<think>\nA cat?</think>Yes.", True, ("A cat?", "Yes.")),  # the tag once more
        ("<think>\n\n</think>\n\nYes.", False, ("", "Yes.")),  # a template told not to think
        ("<think>\nA < b, and", False, ("A < b, and", "")),  # cut short
        ("still thinking </thi", True, ("still thinking </thi", "")),
        (" Yes. <think>no</think>", False, ("", " Yes. <think>no</think>")),  # not at the beginning
        ("<thin", False, ("", "<thin")),
        ("<think>a</think>b<think>c</think>", False, ("a", "b<think>c</think>")),
        ("", False, ("", "")),
    ],
)
@given(cuts=st.lists(st.integers(0, 40), max_size=6))
def test_however_a_reply_is_cut_its_thoughts_are_the_same(
    reply: str, is_open: bool, expected: tuple[str, str], cuts: list[int]
) -> None:
    places = sorted({0, len(reply), *(cut for cut in cuts if cut < len(reply))})
    pieces = [reply[start:end] for start, end in pairwise(places)]

    assert split([*pieces, ""], is_open) == expected


def test_thoughts_are_given_as_soon_as_they_are_clear() -> None:
    splitter = ThoughtSplitter()

    assert [splitter.push(piece) for piece in ("<th", "ink>", "a cat ", "is </", "b", "</think>", "\n", "Yes")] == [
        ("", ""),
        ("", ""),
        ("a cat", ""),
        (" is", ""),
        (" </b", ""),
        ("", ""),
        ("", ""),
        ("", "Yes"),
    ]
