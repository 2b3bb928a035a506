"""Each family's calls: what its grammar lets a model write is what its reader understands."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mara_integrations.engine.grammar_compiler import GrammarCompiler
from mara_integrations.messages import Tool
from mara_integrations.replies.families import FAMILIES
from mara_integrations.replies.forms import ReplyForm
from mara_integrations.replies.harmony import HarmonyReader
from mara_integrations.replies.reader import ReplyReader, TagReader
from mara_integrations.replies.reasoning import ThoughtSplitter
from mara_integrations.testing import tiny_tokenizer

BOOK = Tool(
    "book_room",
    "",
    {
        "type": "object",
        "properties": {
            "guest": {"type": "string"},
            "nights": {"type": "integer"},
            "is_paid": {"type": "boolean"},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "extras": {"type": "array", "items": {"type": "string"}},
            "address": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
            "class": {"enum": ["suite", "1"]},
        },
        "required": ["guest", "nights", "is_paid", "note", "extras", "address", "class"],
    },
)
NOW = Tool("now")
TOOLS = (BOOK, NOW)


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def plain(value: Any) -> str:
    return value if isinstance(value, str) else dumped(value)


def qwen_coder(name: str, arguments: dict[str, Any]) -> str:
    written = "".join(f"<parameter={key}>\n{plain(value)}\n</parameter>\n" for key, value in arguments.items())
    written = written or "\n"  # which xgrammar wants, and templates leave out
    return f"<tool_call>\n<function={name}>\n{written}</function>\n</tool_call>"


def mimo(name: str, arguments: dict[str, Any]) -> str:
    written = "".join(f"<parameter={key}>{plain(value)}</parameter>" for key, value in arguments.items())
    return f"<tool_call><function={name}>{written}</function></tool_call>"


def glm(name: str, arguments: dict[str, Any]) -> str:
    written = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{plain(value)}</arg_value>\n" for key, value in arguments.items()
    )
    return f"<tool_call>{name}\n{written}</tool_call>"


def minimax(name: str, arguments: dict[str, Any]) -> str:
    written = "".join(f'<parameter name="{key}">{plain(value)}</parameter>\n' for key, value in arguments.items())
    return f'<minimax:tool_call>\n<invoke name="{name}">\n{written}</invoke>\n</minimax:tool_call>'


def dsml(around: str, space: str = "") -> Callable[[str, dict[str, Any]], str]:
    tag = f"｜DSML｜{space}"

    def write(name: str, arguments: dict[str, Any]) -> str:
        written = "".join(
            f'<{tag}parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
            f"{plain(value)}</{tag}parameter>\n"
            for key, value in arguments.items()
        )
        call = f'<{tag}invoke name="{name}">\n{written}</{tag}invoke>\n'
        return f"\n\n<{tag}{around}>\n{call}</{tag}{around}>"

    return write


def deepseek(call: str) -> Callable[[str, dict[str, Any]], str]:
    def write(name: str, arguments: dict[str, Any]) -> str:
        return f"<｜tool▁calls▁begin｜>{call % (name, dumped(arguments))}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"

    return write


def kimi(name: str, arguments: dict[str, Any]) -> str:
    return (
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>"
        f"{dumped(arguments)}<|tool_call_end|><|tool_calls_section_end|>"
    )


def harmony(name: str, arguments: dict[str, Any]) -> str:
    return (
        "<|channel|>analysis<|message|>I look it up.<|end|><|start|>assistant"
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{dumped(arguments)}"
    )


# How the chat template of each family writes a call of an assistant.
WRITERS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "qwen_3": lambda name, a: f'<tool_call>\n{{"name": "{name}", "arguments": {dumped(a)}}}\n</tool_call>',
    "exaone": lambda name, a: f'<tool_call>{{"name": "{name}", "arguments": {dumped(a)}}}</tool_call>',
    "llama": lambda name, a: f'{{"name": "{name}", "parameters": {dumped(a)}}}',
    "mistral": lambda name, a: f'[TOOL_CALLS] [{{"name": "{name}", "arguments": {dumped(a)}}}]',
    "mistral_v11": lambda name, a: f"[TOOL_CALLS]{name}[ARGS]{dumped(a)}",
    "qwen_3_coder": qwen_coder,
    "mimo": mimo,
    "glm_4_7": glm,
    "minimax": lambda name, a: "\n" + minimax(name, a),
    "deepseek_v3_2": dsml("function_calls"),
    "deepseek_v4": dsml("tool_calls"),
    "deepseek_v4_1": dsml("calls", " "),
    "deepseek_v3_1": deepseek("<｜tool▁call▁begin｜>%s<｜tool▁sep｜>%s"),
    "deepseek_r1": deepseek("<｜tool▁call▁begin｜>function<｜tool▁sep｜>%s\n```json\n%s\n```"),
    "kimi": kimi,
    "harmony": harmony,
}
FAMILY = pytest.mark.parametrize("family", sorted(FAMILIES))


def accepts(form: ReplyForm, family: str, text: str) -> bool:
    """Whether a reply may be this text, and end with it."""
    import xgrammar

    tag = form.grammar(FAMILIES[family])
    assert tag is not None
    matcher = xgrammar.GrammarMatcher(GrammarCompiler.of(TOKENIZER, 256, {0}).compile(tag))
    return matcher.accept_string(text) and matcher.is_completed()


TOKENIZER = tiny_tokenizer()


def reader(family: str) -> ReplyReader:
    if family == "harmony":
        return HarmonyReader()
    return TagReader(ThoughtSplitter(), FAMILIES[family].reader(TOOLS))


def read(family: str, pieces: list[str]) -> tuple[str, list[tuple[str, Any]], str]:
    """Text, calls, and the calls' arguments as they were streamed."""
    parts, text, streamed = reader(family), "", ""
    for i, piece in enumerate(pieces):
        for new in parts.push(piece, "stop" if i == len(pieces) - 1 else None):
            text += new.text
            streamed += new.call.arguments if new.call else ""
    return text, [(call.name, call.parsed) for call in parts.calls], streamed


def cut(whole: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(whole), *(place for place in cuts if place < len(whole))})
    return [whole[start:end] for start, end in pairwise(places)]


WORDS = st.text(st.sampled_from('ab "1{}\\<>&/é'), min_size=1, max_size=8).map(lambda text: f"Ann {text}.")
ARGUMENTS = st.fixed_dictionaries(
    {
        "guest": WORDS,
        "nights": st.integers(-3, 99),
        "is_paid": st.booleans(),
        "note": st.none() | WORDS,
        "extras": st.lists(WORDS, max_size=2),
        "address": st.fixed_dictionaries({"city": WORDS}),
        "class": st.sampled_from(["suite", "1"]),
    }
).map(lambda arguments: {name: arguments[name] for name in BOOK.parameters["properties"]})  # in the schema's order


def test_every_family_is_tested() -> None:
    assert set(WRITERS) == set(FAMILIES)


@FAMILY
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=ARGUMENTS, cuts=st.lists(st.integers(0, 400), max_size=6))
def test_a_call_that_the_grammar_allows_is_read_back_as_it_was_meant(
    family: str, arguments: dict[str, Any], cuts: list[int]
) -> None:
    written = WRITERS[family]("book_room", arguments)

    assert accepts(ReplyForm(TOOLS, "any"), family, written)
    assert accepts(ReplyForm(TOOLS, "book_room"), family, written)
    text, calls, streamed = read(family, cut(written, cuts))

    assert (text, calls) == ("", [("book_room", arguments)])
    assert json.loads(streamed) == arguments


@FAMILY
def test_a_call_without_arguments_is_read(family: str) -> None:
    written = WRITERS[family]("now", {})

    assert accepts(ReplyForm(TOOLS, "now"), family, written)
    assert read(family, [*written])[:2] == ("", [("now", {})])


ROOM = {
    "guest": "Ann",
    "nights": 2,
    "is_paid": True,
    "note": None,
    "extras": [],
    "address": {"city": "Oslo"},
    "class": "1",
}


@FAMILY
def test_text_before_a_call_is_kept(family: str) -> None:
    call = WRITERS[family]("book_room", ROOM)
    written = f"Well, I book it.\n{call}"
    if family == "harmony":
        start, _, last = call.rpartition("<|start|>assistant")
        said = "<|channel|>commentary<|message|>Well, I book it.<|end|>"
        written = f"{start}<|start|>assistant{said}<|start|>assistant{last}"
    if family in ("mistral", "mistral_v11"):
        written = written.replace("[TOOL_CALLS]", "").replace("\n [", "\n[")  # the trigger alone is held to the form

    assert accepts(ReplyForm(TOOLS), family, written)
    if family != "mistral_v11":
        text, calls, _ = read(family, [*written])
        assert (text.rstrip(), calls) == ("Well, I book it.", [("book_room", ROOM)])


@FAMILY
def test_a_reply_may_be_text_alone_where_calls_are_free_and_not_where_they_are_wanted(family: str) -> None:
    written = "It is <b>late</b>: 7 o'clock."
    if family == "harmony":
        written = f"<|channel|>analysis<|message|>No tool.<|end|><|start|>assistant<|channel|>final<|message|>{written}"

    assert accepts(ReplyForm(TOOLS), family, written)
    assert not accepts(ReplyForm(TOOLS, "any"), family, written)
    assert read(family, [*written])[:2] == ("It is <b>late</b>: 7 o'clock.", [])


@FAMILY
def test_a_reply_that_has_to_call_calls(family: str) -> None:
    assert not accepts(ReplyForm(TOOLS, "any"), family, "")
    assert not accepts(ReplyForm(TOOLS, "now"), family, WRITERS[family]("book_room", ROOM))


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"harmony"}))
def test_several_calls_are_read_one_by_one(family: str) -> None:
    one, two = (WRITERS[family](name, a).strip() for name, a in (("book_room", ROOM), ("now", {})))
    written = {
        "deepseek_v3_1": lambda: one.removesuffix("<｜tool▁calls▁end｜>") + two.removeprefix("<｜tool▁calls▁begin｜>"),
        "kimi": lambda: (
            one.removesuffix("<|tool_calls_section_end|>")
            + two.removeprefix("<|tool_calls_section_begin|>").replace(":0", ":1")
        ),
    }.get(family, lambda: one + "\n" + two)()
    form = ReplyForm(TOOLS, "any", parallel=True)

    assert read(family, [*written])[:2] == ("", [("book_room", ROOM), ("now", {})])
    if family in ("qwen_3", "qwen_3_coder", "glm_4_7", "llama", "exaone", "mistral", "deepseek_v3_1", "kimi"):
        assert accepts(form, family, written)
        assert not accepts(ReplyForm(TOOLS, "any", parallel=False), family, written)


@FAMILY
def test_a_call_that_breaks_off_is_an_error_and_not_text(family: str) -> None:
    written = WRITERS[family]("book_room", ROOM)
    parts = reader(family)

    parts.push(written[: written.index("Oslo")], "length")

    (call,) = parts.calls
    assert call.parsed is None and call.error and "max_tokens" in call.error


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"harmony"}))
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_text_is_read_the_same_however_it_is_cut(family: str, data: st.DataObject) -> None:
    call = WRITERS[family]("book_room", ROOM)
    begin, end = data.draw(st.integers(0, len(call))), data.draw(st.integers(0, len(call)))
    before, between = data.draw(st.sampled_from(["", "So. ", "<"])), data.draw(st.sampled_from(["", " \n"]))
    whole = before + call[begin:] + between + call[:end]
    pieces = cut(whole, data.draw(st.lists(st.integers(0, 500), max_size=6)))

    assert read(family, [*pieces, ""])[:2] == read(family, [whole])[:2]


def test_kimi_reads_the_id_that_its_header_is() -> None:
    parts = FAMILIES["kimi"].reader(TOOLS)

    parts.push(kimi("book_room", ROOM), final=True)

    assert parts.calls[0].id == "functions.book_room:0"


def test_gpt_oss_thinks_and_answers_in_channels() -> None:
    parts, thoughts, text = HarmonyReader(), "", ""
    written = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Four."

    for character in written:
        for piece in parts.push(character):
            thoughts, text = thoughts + piece.thoughts, text + piece.text
    parts.push("", "stop")

    assert (thoughts, text, parts.calls) == ("Hm.", "Four.", [])


def test_gpt_oss_is_held_to_a_schema_in_its_last_channel_alone() -> None:
    form = ReplyForm(json_schema={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})

    assert accepts(form, "harmony", '<|channel|>final<|message|>{"a": 1}')
    thoughts = "<|channel|>analysis<|message|>x<|end|><|start|>assistant"
    assert accepts(form, "harmony", thoughts + '<|channel|>final<|message|>{"a": 1}')
    assert not accepts(form, "harmony", "<|channel|>final<|message|>One.")
    assert not accepts(form, "harmony", '{"a": 1}')
