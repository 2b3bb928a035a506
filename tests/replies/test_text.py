"""Streamed text is the whole text: whole characters, stop strings held back and cut, whatever the pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.replies.text import TextStream
from mara_integrations.testing import tiny_tokenizer


class ByteTokenizer:
    """One token a byte: every character above ASCII is split over several."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


def stream(tokenizer, ids, stop=()):
    text, pieces = TextStream(tokenizer, stop), []
    for token_id in ids:
        pieces.append(text.push(token_id))
        if text.stopped:
            break
    pieces.append(text.finish())
    assert "".join(pieces) == text.text
    return pieces, text


@given(st.text(max_size=40))
def test_pieces_add_up_to_the_text_and_are_whole_characters(s):
    pieces, text = stream(ByteTokenizer(), s.encode("utf-8", errors="replace"))
    assert text.text == s.encode("utf-8", errors="replace").decode()
    assert s.count("\ufffd") or not any("\ufffd" in piece for piece in pieces)


@given(
    st.text(alphabet="ab#\n", max_size=30),
    st.lists(st.text(alphabet="ab#\n", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_text_ends_before_the_first_stop_string(s, stop):
    _, text = stream(ByteTokenizer(), s.encode(), stop)
    cuts = [s.find(x) for x in stop if x in s]
    if not cuts:
        assert text.text == s and not text.stopped
    else:  # the first stop string to be complete ends the text
        assert text.stopped and s.startswith(text.text) and not any(x in text.text for x in stop)
        done = min(s.find(x) + len(x) for x in stop if x in s)
        assert len(text.text) == min(s[:done].find(x) for x in stop if x in s[:done])


def test_a_possible_beginning_of_a_stop_string_is_held_back():
    text = TextStream(ByteTokenizer(), ["###"])
    assert [text.push(b) for b in b"a##b##"] == ["a", "", "", "##b", "", ""]
    assert text.push(ord("#")) == "" and text.stopped and text.text == "a##b"


def test_an_unfinished_character_at_the_end_is_shown_as_the_tokenizer_shows_it():
    _, text = stream(ByteTokenizer(), "é".encode()[:1])
    assert text.text == "\ufffd"


def test_special_tokens_are_no_text():
    tokenizer = tiny_tokenizer()
    _, text = stream(tokenizer, [*tokenizer("abc").input_ids, tokenizer.eos_token_id])
    assert text.text == "abc"
