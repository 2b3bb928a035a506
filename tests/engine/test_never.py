from __future__ import annotations

import codecs
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.never import NeverConstraint
from mara_integrations.engine.refusals import refusals_of
from mara_integrations.engine.request import Request
from mara_integrations.engine.token_texts import TokenTexts, may_become_letter
from mara_integrations.errors import ConfigError, ModelError
from mara_integrations.messages import Message, Tool
from mara_integrations.replies.forms import ReplyForm
from mara_integrations.replies.text import TextStream
from mara_integrations.rewards.protocol import DescribedRule
from mara_integrations.rewards.rules import parse_rule
from mara_integrations.rewards.words import ForbiddenWords
from mara_integrations.runtime import MARAEngine
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import ScriptedBackend, random_head, tiny_model, tiny_tokenizer

EOS = 0
PIECES = [
    *(bytes([byte]) for byte in b"abys .'\nSBA_"),
    *("é".encode()[i : i + 1] for i in (0, 1)),
    *("\u0301".encode()[i : i + 1] for i in (0, 1)),
    *("’".encode()[i : i + 1] for i in (0, 1, 2)),
    *(text.encode() for text in ("ab", " ab", "ab ", "Ab.", "ß", "ss", " s", "ba ab")),
    *(text.encode() for text in ("éa", " a b", "ys", "aby", "ab'")),
    b"s" + "é".encode()[:1],
    b"\xa9 ab",
]
SIZE = len(PIECES) + 2
PATTERNS = [
    "re:ab",
    r"re:\bab\b",
    "re:(?i)b'?a",
    "re:é",
    r"re:[^\x00-\x7f]",
    r"re:y+s\b",
    "re:^a",
    "re:s$",
    r"re:\.\s",
    "re:a.b",
    r"re:(?<!\w)s[^s]*s(?!\w)",
    r"re:a(?:\b|b\B)",
]
WORDS = ["ab", "a b", "yss", "é", "b'a", "s", ".", "ab*", "*b", "*yss*"]


def tokenizer_of(pieces: Sequence[bytes]) -> PreTrainedTokenizerFast:
    as_text = bytes_to_unicode()
    vocab = {"<eos>": EOS, **{"".join(as_text[b] for b in piece): i for i, piece in enumerate(pieces, start=1)}}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<hidden>"]})
    return tokenizer


TOKENIZER = tokenizer_of(PIECES)
TOKENS = TokenTexts.of(TOKENIZER, SIZE, (), {EOS})
words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3)
words_and_patterns = st.lists(st.sampled_from([*WORDS, *PATTERNS, *PATTERNS]), min_size=1, max_size=3)


def decoded(token_ids: Sequence[int]) -> tuple[str, bytes]:
    """The text of a reply, and the bytes of a character that is not finished."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(b"".join(TOKENS.data[i] for i in token_ids)), decoder.getstate()[0]


@cache
def a_letter(rest: bytes) -> str:
    """A letter that begins with these bytes and ends no word here; empty where there is none."""
    codes = range(0x2FFF, 0x7F, -1) if rest else [ord("ж")]
    letters = (chr(code) for code in codes if chr(code).encode().startswith(rest))
    return next((letter for letter in letters if letter.isalnum() or letter == "\u0300"), "")


def refused_by_brute_force(rule: ForbiddenWords, token_ids: Sequence[int], is_last: bool) -> set[int]:
    refused = set()
    for token_id in range(SIZE):
        text, rest = decoded([*token_ids, token_id])
        ends = is_last or token_id == EOS
        refused |= {token_id} if rule.violations(text if ends else text + a_letter(rest)) else set()
    return refused


@cache
def characters_with(rest: bytes) -> tuple[str, ...]:
    """All characters that begin with these bytes."""
    codes = (code for code in range(0x80, 0x10000) if not 0xD800 <= code < 0xE000)
    return tuple(character for character in map(chr, codes) if character.encode().startswith(rest))


def refused_by_one(rule: DescribedRule, token_ids: Sequence[int], is_last: bool) -> set[int]:
    """The tokens after which there is a match, whatever follows."""
    refused = set()
    for token_id in range(SIZE):
        text, rest = decoded([*token_ids, token_id])
        if (is_last or token_id == EOS) and rule.violations(text + "\ufffd" * bool(rest)):
            refused.add(token_id)
        elif token_id != EOS:
            begins = (text + character for character in (characters_with(rest) if rest else ("",)))
            mores = [*([] if rest else [""]), "ж", " ", "a", "s", ".", "\n", "жж", "\n ", "ss"]
            if all(rule.violations(begin + more) for begin in begins for more in mores):
                refused.add(token_id)
    return refused


def constraint(forbidden: Sequence[str], max_new_tokens: int = 100, stop: Sequence[str] = ()) -> NeverConstraint:
    return NeverConstraint(refusals_of(TOKENS, forbidden, stop, {EOS}), max_new_tokens)


def masked(state: NeverConstraint) -> set[int]:
    logits = torch.zeros(SIZE)
    state.mask(logits)
    assert logits.isfinite().all()
    state.mask_refused(logits)
    refused = set(logits.isneginf().nonzero()[:, 0].tolist())
    assert refused == {token_id for token_id in range(SIZE) if state.refuses(token_id)}
    return refused


@settings(max_examples=60)
@given(words, st.integers(0, 10_000), st.integers(1, 9))
def test_the_mask_is_what_brute_force_finds(forbidden: list[str], seed: int, length: int) -> None:
    rule, state, rng = ForbiddenWords(forbidden), constraint(forbidden, length), random.Random(seed)
    token_ids: list[int] = []

    for place in range(length):
        refused = masked(state)
        assert refused == refused_by_brute_force(rule, token_ids, is_last=place == length - 1)
        allowed = sorted({*range(1, SIZE)} - refused)
        if not allowed:  # half a character that few tokens here can finish
            return
        token_ids.append(rng.choice(allowed))
        state.accept(token_ids[-1])

    assert not rule.violations(decoded(token_ids)[0])


@settings(max_examples=60)
@given(words_and_patterns, st.integers(0, 10_000), st.integers(1, 7))
def test_the_mask_of_patterns_is_what_brute_force_finds(forbidden: list[str], seed: int, length: int) -> None:
    state, rng = constraint(forbidden, length), random.Random(seed)
    notations, given_words = [text for text in forbidden if text[:3] == "re:"], [t for t in forbidden if t[:3] != "re:"]
    token_ids: list[int] = []

    for place in range(length):
        expected = set[int]().union(
            *(refused_by_one(parse_rule([text]), token_ids, place == length - 1) for text in notations),
            refused_by_brute_force(ForbiddenWords(given_words), token_ids, place == length - 1) if given_words else (),
        )
        refused = masked(state)
        assert refused == expected
        allowed = sorted({*range(1, SIZE)} - refused)
        if not allowed:  # half a character that few tokens here can finish
            return
        token_ids.append(rng.choice(allowed))
        state.accept(token_ids[-1])

    assert not parse_rule(forbidden).violations(decoded(token_ids)[0])


def run(seed: int, never: Sequence[str], stop: Sequence[str] = (), head: Any = None, length: int = 12) -> Any:
    """Decode with chosen random logits; the same ones for every reply that begins alike."""

    def script(token_ids: Sequence[int]) -> list[float]:
        rng = random.Random(f"{seed} {list(token_ids)}")
        return [rng.gauss(0, 2) - (3 if token_id == EOS else 0) for token_id in range(SIZE)]

    request = Request(
        [1],
        SamplingParams(max_new_tokens=length, temperature=1.0, seed=seed, top_p=1.0),
        GateParams(),
        head,
        frozenset({EOS}),
        text=TextStream(TOKENIZER, stop),
        constraint=constraint(never, length, stop) if never else None,
    )
    return Decoder(ScriptedBackend(script, SIZE, can_retract=True)).run([request])[0].result()


@settings(max_examples=40)
@given(
    words_and_patterns,
    st.integers(0, 100_000),
    st.sampled_from([(), ("b",), ("ys", " a")]),
    st.sampled_from([None, "q", "paper"]),
)
def test_no_reply_has_a_forbidden_word_and_a_fine_one_is_unchanged(
    forbidden: list[str], seed: int, stop: tuple[str, ...], form: Any
) -> None:
    head = random_head(SIZE + 1, form) if form else None
    rule, free = parse_rule(forbidden), run(seed, (), stop, head)

    try:
        bound = run(seed, forbidden, stop, head)
    except ModelError:  # half a character that few tokens here can finish
        assert rule.violations(free.text)
        return

    assert not rule.violations(bound.text)
    whole = TOKENIZER.decode(free.token_ids, skip_special_tokens=True)
    if form != "paper" and not rule.violations(whole) and not rule.violations(free.text):  # also where it is cut
        assert bound == free


def test_what_is_drawn_follows_the_law_without_the_refused_tokens() -> None:
    """Given "b", 3 of 4 equally likely tokens complete no word; of 200 replies a quarter would have."""
    last, others = PIECES.index(b".") + 1, [PIECES.index(piece) + 1 for piece in (b"a", b"y", b"s")]

    def script(token_ids: Sequence[int]) -> list[float]:
        first = [PIECES.index(b"b") + 1]
        wanted = first if len(token_ids) == 1 else [last, *others]
        return [0.0 if token_id in wanted else -50.0 for token_id in range(SIZE)]

    counts = dict.fromkeys([last, *others], 0)
    for seed in range(200):
        request = Request(
            [1],
            SamplingParams(max_new_tokens=2, temperature=1.0, seed=seed, top_p=1.0),
            eos_token_ids=frozenset({EOS}),
            constraint=constraint(["b"], 2),
        )
        counts[Decoder(ScriptedBackend(script, SIZE)).run([request])[0].token_ids[1]] += 1

    assert counts[last] == 0 and all(42 < counts[token_id] < 92 for token_id in others)


@pytest.fixture(scope="module")
def engine() -> MARAEngine:
    return MARAEngine((tiny_model(max_position_embeddings=2048), tiny_tokenizer()), temperature=1.5, top_p=1.0)


ASK = [Message("user", "hi")]
MAIL = "Ask jane@example.com, or call +49 30 1234567 now."


@pytest.mark.parametrize("head", [None, "q", "paper"])
@pytest.mark.parametrize(
    ("never", "begins", "is_written"),
    [
        (["rule:email"], "Ask jane@example.c", False),
        (["rule:pii"], "Ask jane@example.c", False),
        (["rule:phone"], "Ask jane@example.com, or call +49 30 1234567", True),  # it may go on with a letter
        ([r"re:(?i)\bNOW\b", "jane"], "Ask jane", True),
        ([r"re:\d{9}", "rule:url"], MAIL, True),
    ],
)
def test_what_the_model_wants_to_write_stops_where_it_would_be_complete(
    never: list[str], begins: str, is_written: bool, head: Any
) -> None:
    tokenizer, head = tiny_tokenizer(), random_head(257, head, accept_rate=1.0) if head else None
    wanted = [*tokenizer(MAIL)["input_ids"], EOS]

    def script(token_ids: Sequence[int]) -> list[float]:
        return [30.0 * (token_id == wanted[min(len(token_ids), len(wanted)) - 1]) for token_id in range(256)]

    tokens = TokenTexts.of(tokenizer, 256, (), {EOS})
    request = Request(
        [1],
        SamplingParams(max_new_tokens=80),
        GateParams(),
        head,
        frozenset({EOS}),
        text=TextStream(tokenizer),
        constraint=NeverConstraint(refusals_of(tokens, never, (), {EOS}), 80),
    )
    text = Decoder(ScriptedBackend(script, 256)).run([request])[0].result().text

    assert text.startswith(begins) and (text[: len(begins) + 1] == MAIL[: len(begins) + 1]) == (begins == MAIL)
    assert not parse_rule(never).violations(text)


@pytest.mark.parametrize("seed", range(2))
def test_patterns_hold_in_streams_with_stop_strings_and_log_probabilities(engine: MARAEngine, seed: int) -> None:
    settings: dict[str, Any] = {"never": [r"re:[a-m]{2}", r"re:(?i)\b[n-z]", "rule:markdown"], "stop": ["?", "7"]}
    settings |= {"seed": seed, "max_new_tokens": 80, "head": random_head(32, "q")}

    reply = engine.generate(ASK, **settings)

    assert not parse_rule(settings["never"]).violations(reply.text)
    assert "".join(update.text for update in engine.stream(ASK, **settings)) == reply.text
    assert len(reply.log_probs) == len(reply.token_ids)
    both = engine.generate_batch([ASK, [Message("user", "and now?")]], **settings)
    assert both[0].text == reply.text and not parse_rule(settings["never"]).violations(both[1].text)


def test_patterns_hold_inside_json(engine: MARAEngine) -> None:
    schema = {"type": "object", "properties": {"note": {"type": "string", "maxLength": 30}}, "required": ["note"]}
    never = [r"re:[a-df-mp-su-z]", r"re:\d\b"]

    for seed in range(3):
        reply = engine.generate(ASK, form=ReplyForm(json_schema=schema), never=never, seed=seed, max_new_tokens=200)
        assert not parse_rule(never).violations(reply.text)


LETTERS = tuple("abcdefghijklmnopqrstuvwxyz0123456789")


@pytest.mark.parametrize("seed", range(3))
def test_an_engine_streams_what_it_generates(engine: MARAEngine, seed: int) -> None:
    settings: dict[str, Any] = {"never": LETTERS, "seed": seed, "max_new_tokens": 60, "head": random_head(32, "q")}
    rule = ForbiddenWords(LETTERS)
    assert rule.violations(engine.generate(ASK, **{**settings, "never": None}).text)

    reply = engine.generate(ASK, **settings)

    assert not rule.violations(reply.text)
    assert "".join(update.text for update in engine.stream(ASK, **settings)) == reply.text


def test_words_hold_inside_json(engine: MARAEngine) -> None:
    schema = {"type": "object", "properties": {"note": {"type": "string", "maxLength": 30}}, "required": ["note"]}
    never = [letter for letter in LETTERS if letter not in "note"]

    for seed in range(4):
        reply = engine.generate(ASK, form=ReplyForm(json_schema=schema), never=never, seed=seed, max_new_tokens=200)
        assert not ForbiddenWords(never).violations(reply.text)


@pytest.mark.parametrize(
    "form",
    [
        ReplyForm(json_schema={"enum": ["refund", "return"]}),
        ReplyForm(json_schema={"type": "object", "properties": {"refund": {"type": "number"}}}),
        ReplyForm((Tool("refund_order", "", {"type": "object", "properties": {}}),), "any"),
    ],
)
def test_a_form_that_writes_the_word_itself_is_refused(engine: MARAEngine, form: ReplyForm) -> None:
    with pytest.raises(ConfigError, match="never has 'refund'"):
        engine.request(ASK, form=form, never="refund")


@pytest.mark.parametrize("never", [r"re:\brefund", "re:f.nd", "rule:emoji"])
def test_a_form_that_writes_a_match_itself_is_refused(engine: MARAEngine, never: str) -> None:
    form = ReplyForm(json_schema={"enum": ["refund \U0001f600", "return"]})

    with pytest.raises(ConfigError, match=r"never has .*, which the form of the reply itself writes in 'refund"):
        engine.request(ASK, form=form, never=never)
    engine.request(ASK, form=form, never=["re:^return", "rule:pii"])


@pytest.mark.parametrize(
    ("never", "what"),
    [("re:(", "is not a regular expression"), ("rule:mail", "rule 'mail' is unknown"), (r"re:(.)\1", "back reference")],
)
def test_bad_patterns_are_refused_before_a_model_is_loaded(never: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        MARAEngine("no/such-model", never=never)


def many_tokens() -> tuple[random.Random, TokenTexts]:
    rng = random.Random(0)
    pieces = {"".join(rng.choices("abcdefghij", k=rng.randint(3, 8))).encode() for _ in range(6000)}
    return rng, TokenTexts.of(tokenizer_of(sorted(pieces)), len(pieces) + 2, (), {EOS})


def test_a_pattern_whose_mask_would_take_too_long_is_refused_by_name() -> None:
    rng, tokens = many_tokens()
    hostile = "re:(?:[a-e].{70}|[acegi].{70}|[abfgj].{70})y|z[a]|z[b]|z[c]|z[d]"  # 8 ** 70 states, were they all made
    refusals = refusals_of(tokens, [hostile], (), {EOS})

    state = refusals.read(refusals.start, "".join(rng.choices("abcdefghij", k=300)))

    assert not refusals.refuses(state, b"", 1, is_last=False)
    with pytest.raises(ConfigError, match="takes too long at this place"):
        refusals.token_ids(state, b"", is_last=False)


def test_patterns_that_together_would_take_too_long_are_refused() -> None:
    rng, tokens = many_tokens()
    never = [f"re:(?:[a-e].{{4}}|[acegi].{{4}}){last}" for last in "klmnopqrstuvwxyz"]
    text = "".join(rng.choices("abcdefghij", k=300))
    for one in never[:2]:
        alone = refusals_of(tokens, [one], ["stop"], {EOS})
        alone.token_ids(alone.read(alone.start, text), b"", is_last=False)

    refusals = refusals_of(tokens, never, (), {EOS})
    state = refusals.read(refusals.start, text)
    before = refusals.work

    with pytest.raises(ConfigError, match="never with 16 patterns takes too long at this place"):
        refusals.token_ids(state, b"", is_last=False)
    assert refusals.work - before < 200_000


def test_a_call_adds_to_the_words_and_lifts_none(engine: MARAEngine) -> None:
    strict = engine.with_settings(never="refund")

    assert list(strict.resolve(never=["you"]).sampling.never) == ["refund", "you"]
    assert list(strict.resolve(never=[]).sampling.never) == ["refund"]
    assert engine.resolve().sampling.never == ()


@pytest.mark.parametrize("never", [[""], [" "], ["a" * 201]])
def test_what_is_no_word_is_refused(never: list[str]) -> None:
    with pytest.raises(ConfigError, match="never"):
        SamplingParams.of(never=never)


def test_a_tokenizer_that_writes_otherwise_is_refused() -> None:
    odd = tokenizer_of(PIECES)
    odd.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "o")])

    with pytest.raises(ConfigError, match="can't be forbidden with this tokenizer"):
        TokenTexts.of(odd, SIZE, (), {EOS})


@pytest.mark.parametrize(
    ("unfinished", "may"),
    [(b"\xc3", True), (b"\xe2", True), (b"\xe2\x80", False), (b"\xf0", True), (b"\xf0\x9f\x98", False)],
)
def test_whether_a_letter_begins_with_some_bytes(unfinished: bytes, may: bool) -> None:
    assert may_become_letter(unfinished) == may


def test_no_letter_is_beyond_the_planes_that_are_looked_at() -> None:
    assert not any(chr(code).isalnum() for code in range(0x40000, 0x110000))


def test_pieces_of_sentencepiece_are_read_as_text() -> None:
    vocab = {"<unk>": 0, "▁re": 1, "fund": 2, "<0xC3>": 3, "<0xA9>": 4, "s": 5}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = TokenTexts.of(PreTrainedTokenizerFast(tokenizer_object=core), 8, (), ())

    assert tokens.data == [b"<unk>", b" re", b"fund", b"\xc3", b"\xa9", b"s", b"", b""]
