from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.grammar import LOOK_AHEAD, Grammar
from mara_integrations.engine.grammar_compiler import GrammarCompiler
from mara_integrations.errors import ConfigError
from mara_integrations.messages import Message, Tool
from mara_integrations.replies.families import FAMILIES
from mara_integrations.replies.forms import ReplyForm
from mara_integrations.replies.tool_calls import CallParser
from mara_integrations.runtime import MARAEngine, worker_for
from mara_integrations.testing import ScriptedBackend, random_head, tiny_model, tiny_tokenizer

HERMES = FAMILIES["qwen_3"]

TAG = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"], "additionalProperties": False}
JOKE = {
    "type": "object",
    "properties": {
        "setup": {"type": "string", "maxLength": 20},
        "rating": {"type": "integer", "minimum": 1, "maximum": 5},
        "kind": {"enum": ["pun", "riddle"]},
        "tags": {
            "type": "array",
            "items": {"type": "object", "properties": {"x": {"enum": [1, 2.5]}}, "required": ["x"]},
            "maxItems": 3,
        },
    },
    "required": ["setup", "rating", "kind", "tags"],
    "additionalProperties": False,
}
TOOLS = (
    Tool("add", "", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}),
    Tool("now", "", {"type": "object", "properties": {}}),
)
ASK = [Message("user", "hi")]


@pytest.fixture(scope="module")
def engine() -> MARAEngine:
    return MARAEngine((tiny_model(max_position_embeddings=2048), tiny_tokenizer()))


def grammar(schema: dict[str, Any]) -> Grammar:
    form = ReplyForm(json_schema=schema).grammar(HERMES)
    assert form is not None
    return Grammar(form, tokenizer=tiny_tokenizer(), vocab_size=256, eos_token_ids=[0])


def test_the_mask_leaves_what_the_schema_allows_and_the_end() -> None:
    state, tokenizer = grammar({"enum": [True, 12]}), tiny_tokenizer()

    def allowed() -> set[str]:
        logits = torch.zeros(256)
        state.mask(logits)
        return {tokenizer.decode([i]) for i in logits.isfinite().nonzero()[:, 0].tolist()}

    assert allowed() == {"t", "1"}
    state.accept(tokenizer("1")["input_ids"][0])
    assert allowed() == {"2"}
    state.accept(tokenizer("2")["input_ids"][0])
    assert allowed() == {"<eos>"}


def test_one_tokenizer_serves_models_of_several_widths() -> None:
    form, tokenizer = ReplyForm(json_schema={"enum": [True]}).grammar(HERMES), tiny_tokenizer()
    assert form is not None

    for width in (256, 320):
        logits = torch.zeros(width)
        Grammar(form, tokenizer=tokenizer, vocab_size=width, eos_token_ids=[0]).mask(logits)
        assert logits.isfinite().sum() == 1


@pytest.mark.parametrize("head", [None, "paper", "residual"])
@pytest.mark.parametrize("seed", range(4))
def test_a_random_model_writes_json_of_the_schema(engine: MARAEngine, head: Any, seed: int) -> None:
    given_head = random_head(32, head) if head else None

    reply = engine.generate(
        ASK,
        form=ReplyForm(json_schema=JOKE),
        head=given_head,
        temperature=1.5,
        top_p=1.0,
        seed=seed,
        max_new_tokens=300,
    )

    joke = json.loads(reply.text)
    assert set(joke) == set(JOKE["properties"])
    assert joke["rating"] in range(1, 6) and joke["kind"] in ("pun", "riddle")
    assert all(set(tag) == {"x"} for tag in joke["tags"])


def test_a_token_that_is_forced_is_taken_unasked(engine: MARAEngine) -> None:
    form = ReplyForm(TOOLS, "now")

    reply = engine.generate(ASK, form=form, head=random_head(32, accept_rate=0.01), trace=True, max_new_tokens=100)

    assert reply.stats.single >= len('<tool_call>\n{"name": "now", "arguments": {')
    assert reply.trace is not None
    assert all(not position.accept_logits for position in reply.trace if len(position.token_ids) == 1)


@pytest.mark.parametrize("choice", ["any", "add", "now"])
def test_a_forced_call_is_one_call(engine: MARAEngine, choice: str) -> None:
    reply = engine.generate(ASK, form=ReplyForm(TOOLS, choice), temperature=1.5, seed=1, max_new_tokens=120)

    parser = CallParser(HERMES.marks)
    assert reply.text == "" and parser.push(reply.raw_text, final=True)[0].text == ""
    (call,) = parser.calls
    assert call.parsed is not None
    assert choice in ("any", call.name)
    assert set(call.parsed) == ({"a"} if call.name == "add" else set())


def test_a_reply_that_does_not_fit_is_cut_and_not_filled(engine: MARAEngine) -> None:
    whole = engine.generate(ASK, form=ReplyForm(json_schema=JOKE), max_new_tokens=300)
    assert whole.finish_reason == "stop"

    for budget in (1, 10, len(whole.token_ids) - 1):
        reply = engine.generate(ASK, form=ReplyForm(json_schema=JOKE), max_new_tokens=budget)

        assert reply.finish_reason == "length"
        assert reply.token_ids == whole.token_ids[:budget]


def test_a_reply_that_just_fits_is_whole(engine: MARAEngine) -> None:
    whole = engine.generate(ASK, form=ReplyForm(json_schema=JOKE), max_new_tokens=300)

    for spare in (0, 1, 16):
        reply = engine.generate(ASK, form=ReplyForm(json_schema=JOKE), max_new_tokens=len(whole.token_ids) + spare)

        assert (reply.text, reply.finish_reason) == (whole.text, "stop")


def scripted(written: str) -> Any:
    """A model that writes one text, if it may, and ends."""
    tokenizer = tiny_tokenizer()
    wanted, turn = [*tokenizer(written)["input_ids"], 0], tokenizer("[assistant] ")["input_ids"]

    def script(token_ids: Any) -> list[float]:
        begin = max(i + len(turn) for i in range(len(token_ids)) if list(token_ids[i : i + len(turn)]) == turn)
        done = list(token_ids[begin:])
        following = wanted[len(done)] if done == wanted[: len(done)] else 0
        return [20.0 if token_id == following else float(token_id == 24) for token_id in range(256)]  # else: an 8

    engine = MARAEngine((tiny_model(max_position_embeddings=2048), tokenizer))
    worker_for(engine.model).decoder = Decoder(ScriptedBackend(script, 256))
    return engine


def test_an_end_that_the_model_itself_came_to_is_its_own() -> None:
    schema = {"type": "object", "properties": {"note": {"type": "string"}}, "required": ["note"]}
    text = '{"note": "a short note, it ends here"}'

    reply = scripted(text).generate(ASK, form=ReplyForm(json_schema=schema), max_new_tokens=len(text) + 10)

    assert (reply.text, reply.finish_reason) == (text, "stop")


def test_a_number_that_does_not_end_is_cut() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}

    reply = scripted("").generate(ASK, form=ReplyForm(json_schema=schema), max_new_tokens=300)

    assert reply.text == '{"a": ' + "8" * (300 - len('{"a": ')) and reply.finish_reason == "length"


def test_certain_text_costs_no_forward_a_token() -> None:
    tool = Tool("magic_function", "", {"type": "object", "properties": {"input": {"const": 3}}, "required": ["input"]})
    engine = scripted("")

    reply = engine.generate(ASK, form=ReplyForm((tool,), "any"))

    assert reply.raw_text == '<tool_call>\n{"name": "magic_function", "arguments": {"input": 3}}\n</tool_call>'
    assert reply.stats.single == len(reply.token_ids) == len(reply.raw_text) + 1
    assert len(worker_for(engine.model).decoder.backend.fed) <= 4  # the prompt, the text, its last character, its end


def test_the_state_after_certain_text_is_that_of_the_text(engine: MARAEngine) -> None:
    form = ReplyForm(json_schema=JOKE)
    reply = engine.generate(ASK, form=form, max_new_tokens=60, head=random_head(32))

    prompt_ids = engine.encode(ASK)
    logits = engine.model.model(torch.tensor([[*prompt_ids, *reply.token_ids]])).logits[0, len(prompt_ids) - 1 :]
    state = grammar(JOKE)
    for row, token_id, log_prob in zip(logits.detach(), reply.token_ids, reply.log_probs, strict=False):
        row = row.clone()
        state.mask(row)
        state.accept(token_id)
        assert row.log_softmax(-1)[token_id].item() == pytest.approx(log_prob, abs=1e-3)


def test_certain_text_is_looked_for_no_farther_than_it_is_soon_written() -> None:
    state, start, written = grammar({"const": "x" * 8_000}), time.process_time(), 0

    while ahead := state.certain():
        assert len(ahead) <= LOOK_AHEAD
        for token_id in ahead:
            state.mask(logits := torch.zeros(256))
            assert logits.isfinite().nonzero().flatten().tolist() == [token_id]
            state.accept(token_id)
        written += len(ahead)

    assert written > 8_000 - LOOK_AHEAD
    assert time.process_time() - start < 20  # looking to its end at every position takes many times as long


def test_a_slow_grammar_is_given_up_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch, engine: MARAEngine) -> None:
    ended = threading.Event()
    with monkeypatch.context() as slow:
        slow.setattr(GrammarCompiler, "_compile", lambda *_: ended.wait(30))
        slow.setattr("mara_integrations.engine.grammar_compiler.DEADLINE_S", 0.5)
        start = time.monotonic()

        waiting = [threading.Thread(target=_refused, args=(engine, i)) for i in range(4)]
        for thread in waiting:
            thread.start()
        assert engine.generate(ASK, max_new_tokens=3).token_ids  # others go on meanwhile
        for thread in waiting:
            thread.join()
        assert time.monotonic() - start < 20
        ended.set()


def _refused(engine: MARAEngine, number: int) -> None:
    with pytest.raises(ConfigError, match=r"longer than 0\.5 s"):
        engine.generate(ASK, form=ReplyForm(json_schema={"const": number}))


@pytest.mark.parametrize("bound_s", [30.0, 0.0])
def test_python_ends_after_a_compilation_that_was_given_up_but_does_not_wait_for_long(
    tmp_path: Path, bound_s: float
) -> None:
    code = f"""
import time
from pathlib import Path
from mara_integrations.engine import grammar_compiler

def work():
    time.sleep(2)
    Path({str(tmp_path / "ended")!r}).touch()

grammar_compiler._EXIT_WAIT_S = {bound_s}
try:
    grammar_compiler.within(0.01, work)
except Exception as late:
    print(late)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert "took longer than 0.01 s" in done.stdout
    assert (tmp_path / "ended").exists() is (bound_s > 0)


def test_a_schema_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, form = tiny_tokenizer(), ReplyForm(json_schema={"const": "once"}).grammar(HERMES)
    assert form is not None
    settings: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": 256, "eos_token_ids": [0]}
    Grammar(form, **settings)
    monkeypatch.setattr(GrammarCompiler, "_compile", None)

    assert Grammar(form, **settings).certain()


def test_a_schema_that_is_none_is_refused(engine: MARAEngine) -> None:
    with pytest.raises(ConfigError, match="can't be compiled to a grammar"):
        engine.generate(ASK, form=ReplyForm(json_schema={"type": "nonsense"}))


async def test_constrained_and_free_requests_share_a_batch(engine: MARAEngine) -> None:
    forms = [None, ReplyForm(json_schema=JOKE), ReplyForm(TOOLS, "any"), None]
    settings = [{"form": form, "max_new_tokens": 60, "seed": i} for i, form in enumerate(forms)]
    alone = [engine.generate(ASK, **each).text for each in settings]

    together = await asyncio.gather(*(engine.agenerate(ASK, **each) for each in settings))

    assert [generation.text for generation in together] == alone


@pytest.mark.parametrize("bound", [{}, {"maxLength": 9}, {"pattern": "^.*$"}])
def test_a_string_holds_no_control_character(bound: dict[str, Any]) -> None:
    tokenizer, state = tiny_tokenizer(), grammar({"type": "string", **bound})
    state.accept(tokenizer('"')["input_ids"][0])

    state.mask(logits := torch.zeros(256))

    for character in "\t\n\r\0\x1f":
        assert logits[tokenizer(character)["input_ids"]].isneginf().all()
    assert logits[tokenizer("a")["input_ids"]] == 0


@pytest.mark.parametrize("word", ["größe", "éa", "a\\xe9", "你好", "\U0001f600f", 'say "a"', "tab\tand\nline", "\\"])
def test_names_and_words_are_written_letter_for_letter(engine: MARAEngine, word: str) -> None:
    schema = {"type": "object", "properties": {word: {"const": word}}, "required": [word]}

    reply = engine.generate(ASK, form=ReplyForm(json_schema=schema), max_new_tokens=150)

    assert json.loads(reply.text) == {word: word}
