from __future__ import annotations

import asyncio
import copy
import json
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from mara_integrations import ChatMARA
from mara_integrations.engine.head import MARAHead
from mara_integrations.errors import ConfigError, HeadError
from mara_integrations.langchain import as_conversation
from mara_integrations.messages import Message, ToolCall
from mara_integrations.runtime import worker_for
from mara_integrations.testing import ScriptedBackend, random_head, tiny_model, tiny_tokenizer

LONG = 300  # tokens


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return tiny_model(max_position_embeddings=2048), tiny_tokenizer()


@pytest.fixture
def llm(loaded: tuple[Any, Any]) -> ChatMARA:
    return ChatMARA(loaded, head=random_head(32), max_tokens=12)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise TimeoutError


class Forwards:
    """Counts the forwards of a model."""

    def __init__(self, llm: ChatMARA, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.widest = 0  # sequences in one forward
        backend = worker_for(llm.engine.model)._decoder.backend
        feed = backend.feed

        def counting(segments: Any) -> torch.Tensor:
            self.count += 1
            self.widest = max(self.widest, len(segments))
            return feed(segments)

        monkeypatch.setattr(backend, "feed", counting)


def total(chunks: Any) -> AIMessageChunk:
    whole: Any = None
    for chunk in chunks:
        whole = chunk if whole is None else whole + chunk
    assert isinstance(whole, AIMessageChunk)
    return whole


@pytest.fixture
def says(llm: ChatMARA, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ChatMARA]:
    """Makes the model prefer to write a given reply."""
    tokenizer = llm.engine.model.tokenizer

    def scripted(reply: str, **settings: Any) -> ChatMARA:
        wanted, turn = ([*tokenizer(text)["input_ids"]] for text in (reply, "[assistant] "))
        wanted.append(tokenizer.eos_token_id)

        def script(tokens: Any) -> list[float]:
            ends = [i + len(turn) for i in range(len(tokens)) if list(tokens[i : i + len(turn)]) == turn]
            written = len(tokens) - max(ends, default=len(tokens))
            return [30.0 * (token_id == wanted[min(written, len(wanted) - 1)]) for token_id in range(256)]

        decoder = worker_for(llm.engine.model)._decoder
        monkeypatch.setattr(decoder, "backend", ScriptedBackend(script, 256))
        return llm.model_copy(update={"head": None, "max_tokens": 300, **settings})

    return scripted


# --- settings


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ({"temperature": -1}, "temperature=-1.0"),
        ({"top_k": "many"}, "top_k='many'"),
        ({"top_p": 0}, "top_p=0.0"),
        ({"selection": "worst"}, "selection='worst'"),
        ({"max_tokens": 0}, "max_new_tokens=0"),
        ({"stop": ["a", ""]}, "stop="),
        ({"head": 3}, "head=3"),
        ({"hed": "heads/x"}, "did you mean head"),
    ],
)
def test_a_bad_setting_is_refused_by_the_constructor(setting: dict[str, Any], shown: str) -> None:
    with pytest.raises(ConfigError, match=shown):
        ChatMARA("smollm2", **setting)


def test_the_constructor_loads_nothing() -> None:
    llm = ChatMARA("no/such-model", head="no/such/head")

    assert llm.model_name == "no/such-model"
    with pytest.raises(HeadError):
        llm.invoke("hi")


def test_settings_of_a_call_win_over_those_of_the_object(llm: ChatMARA) -> None:
    head, other = random_head(32, seed=5), random_head(32, seed=6)
    base = llm.invoke("hi", head=None).content

    assert len(llm.invoke("hi", max_tokens=3).response_metadata["token_ids"]) == 3
    assert len(llm.invoke("hi", max_new_tokens=4).response_metadata["token_ids"]) == 4
    assert llm.invoke("hi", strength=0).content == base != llm.invoke("hi").content
    assert llm.invoke("hi", head=head).content != llm.invoke("hi", head=other).content
    assert llm.invoke("hi", head=None, top_k=1, temperature=9.0).content == base
    sampled = {llm.invoke("hi", head=None, temperature=3.0, top_p=1.0, seed=seed).content for seed in (1, 1, 2)}
    assert len(sampled) == 2
    assert "trace" not in llm.invoke("hi").response_metadata
    assert "trace" in llm.invoke("hi", trace=True).response_metadata
    with pytest.raises(ConfigError, match="temprature=1"):
        llm.invoke("hi", temprature=1)


def test_a_bound_setting_takes_effect(llm: ChatMARA) -> None:
    assert len(llm.bind(max_tokens=2).invoke("hi").response_metadata["token_ids"]) == 2


def test_a_changed_field_takes_effect(llm: ChatMARA) -> None:
    llm.invoke("hi")

    assert len(llm.model_copy(update={"max_tokens": 3}).invoke("hi").response_metadata["token_ids"]) == 3
    llm.max_tokens = 5
    assert len(llm.invoke("hi").response_metadata["token_ids"]) == 5
    llm.model = (tiny_model(seed=1), tiny_tokenizer())
    assert llm.engine.model.model is llm.model[0]


def test_copies_share_the_weights(llm: ChatMARA) -> None:
    answer = llm.invoke("hi").content

    for twin in (copy.copy(llm), copy.deepcopy(llm), llm.model_copy(deep=True)):
        assert twin.model[0] is llm.model[0] and twin.head is llm.head
        assert twin.invoke("hi").content == answer


def test_pickling_keeps_the_settings_and_refuses_weights(llm: ChatMARA) -> None:
    named = ChatMARA("smollm2", temperature=0.5, stop=["x"])

    assert pickle.loads(pickle.dumps(named)) == named
    with pytest.raises(ConfigError, match="not pickled"):
        pickle.dumps(llm)


# --- answers


def test_an_answer_says_what_the_gate_did(llm: ChatMARA) -> None:
    message = llm.invoke("hi", trace=True)
    report = message.response_metadata

    assert report["model_name"] and report["finish_reason"] == "length"
    assert len(report["token_ids"]) == 12
    assert report["gate"]["accepted"] + report["gate"]["fallbacks"] + report["gate"]["single"] == 12
    assert report["gate"]["rejected"] > 0
    assert message.usage_metadata is not None
    assert message.usage_metadata["output_tokens"] == 12
    for position, token_id in zip(report["trace"], report["token_ids"], strict=True):
        assert position["candidates"][position["taken"]]["token_id"] == token_id
    first = report["trace"][0]["candidates"][0]
    assert set(first) == {"token_id", "token", "log_prob", "accept_logit"}
    json.dumps(report)


def test_a_chain_runs_through_parser_stream_and_batch(llm: ChatMARA) -> None:
    chain = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "{q}")]) | llm | StrOutputParser()
    answer = chain.invoke({"q": "hi"})

    assert answer
    assert "".join(chain.stream({"q": "hi"})) == answer
    assert chain.batch([{"q": "hi"}, {"q": "hi"}]) == [answer, answer]


async def test_the_async_chain_gives_the_same(llm: ChatMARA) -> None:
    chain = ChatPromptTemplate.from_messages([("human", "{q}")]) | llm | StrOutputParser()
    answer = chain.invoke({"q": "hi"})

    assert await chain.ainvoke({"q": "hi"}) == answer
    assert "".join([piece async for piece in chain.astream({"q": "hi"})]) == answer
    assert await chain.abatch([{"q": "hi"}]) == [answer]


def test_chunks_add_up_to_the_answer_with_one_usage(llm: ChatMARA) -> None:
    message = llm.invoke("hi", trace=True)
    chunks = list(llm.stream("hi", trace=True))

    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert isinstance(whole, AIMessageChunk)
    assert whole.content == message.content
    assert whole.usage_metadata == message.usage_metadata
    for report in (whole.response_metadata, message.response_metadata):
        report["gate"].pop("fed")  # what was fed ahead depends on what came before, and so do the last digits
        report["trace"] = [position["taken"] for position in report["trace"]]
    assert whole.response_metadata == message.response_metadata
    assert [chunk.usage_metadata is not None for chunk in chunks].count(True) == 1


def test_usage_reaches_the_usage_callback(llm: ChatMARA) -> None:
    usage = UsageMetadataCallbackHandler()

    llm.invoke("hi", config={"callbacks": [usage]})

    (counts,) = usage.usage_metadata.values()
    assert counts["output_tokens"] == 12


def test_streaming_true_fires_a_callback_a_chunk(llm: ChatMARA) -> None:
    from langchain_core.callbacks import BaseCallbackHandler

    class Tokens(BaseCallbackHandler):
        seen: str = ""

        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            self.seen += token

    tokens = Tokens()
    answer = llm.model_copy(update={"streaming": True}).invoke("hi", config={"callbacks": [tokens]})

    assert tokens.seen == answer.content


def test_a_stop_string_over_several_tokens_is_held_back_in_a_stream(llm: ChatMARA) -> None:
    whole = llm.invoke("hi").content
    stop = whole[2:5]
    expected = whole[: whole.find(stop)]

    chunks = list(llm.stream("hi", stop=[stop]))

    assert "".join(chunk.content for chunk in chunks) == expected  # nothing of the stop string was shown
    assert chunks[-1].response_metadata["finish_reason"] == "stop"
    assert llm.invoke("hi", stop=[stop]).content == expected
    assert llm.model_copy(update={"stop": [stop]}).invoke("hi").content == expected


# --- log-probabilities


def test_log_probs_come_in_the_form_of_openai_with_what_the_gate_did(llm: ChatMARA) -> None:
    message = llm.invoke("hi", logprobs=True, top_logprobs=3)
    report = message.response_metadata

    assert "trace" not in report
    trace = llm.invoke("hi", trace=True).response_metadata["trace"]
    assert len(report["logprobs"]["content"]) == len(report["token_ids"]) == 12
    for token, token_id, seen in zip(report["logprobs"]["content"], report["token_ids"], trace, strict=True):
        taken = seen["candidates"][seen["taken"]]
        assert taken["token_id"] == token_id
        assert token["logprob"] == pytest.approx(taken["log_prob"], abs=1e-4)
        assert token["accept_logit"] == pytest.approx(taken["accept_logit"], abs=1e-4)
        assert token["outcome"] == seen["outcome"]
        assert [top["token"] for top in token["top_logprobs"]] == [each["token"] for each in seen["candidates"][:3]]
        assert set(token["top_logprobs"][0]) == {"token", "bytes", "logprob"}
    assert b"".join(bytes(token["bytes"]) for token in report["logprobs"]["content"]).decode(errors="replace")
    json.dumps(report)


def test_log_probs_are_the_models_own(llm: ChatMARA) -> None:
    message = llm.bind(logprobs=True, head=None).invoke("hi", max_tokens=3)
    prompt_ids = llm.engine.encode([Message("user", "hi")])
    token_ids = message.response_metadata["token_ids"]

    logits = llm.model[0](torch.tensor([[*prompt_ids, *token_ids]])).logits[0, len(prompt_ids) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]
    content = message.response_metadata["logprobs"]["content"]
    assert [token["logprob"] for token in content] == pytest.approx(expected.tolist(), abs=1e-4)
    assert content[0]["top_logprobs"] == [] and content[0]["accept_logit"] is None and content[0]["outcome"] == "base"


def test_log_probs_come_once_in_a_stream(llm: ChatMARA) -> None:
    chunks = list(llm.stream("hi", top_logprobs=2))

    assert ["logprobs" in chunk.response_metadata for chunk in chunks].count(True) == 1
    expected = llm.invoke("hi", top_logprobs=2).response_metadata["logprobs"]["content"]
    content = total(chunks).response_metadata["logprobs"]["content"]
    assert [token["token"] for token in content] == [token["token"] for token in expected]
    assert "logprobs" not in llm.invoke("hi", logprobs=False).response_metadata


@pytest.mark.parametrize("wish", [{"logprobs": "yes"}, {"top_logprobs": -1}, {"logprobs": True, "top_logprobs": 2.5}])
def test_a_wrong_wish_for_log_probs_is_refused(llm: ChatMARA, wish: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="logprobs="):
        llm.invoke("hi", **wish)


def test_parts_of_a_character_have_their_bytes(says: Callable[..., ChatMARA]) -> None:
    content = says("é").invoke("hi", logprobs=True).response_metadata["logprobs"]["content"]

    assert [token["bytes"] for token in content[:2]] == [[0xC3], [0xA9]]


# --- reasoning


@pytest.mark.parametrize("version", [None, "v1"])
def test_thoughts_become_reasoning_blocks(says: Callable[..., ChatMARA], version: Any) -> None:
    model = says("<think>\nA cat?\n</think>\n\nYes.", output_version=version)

    for message in (model.invoke("hi"), total(model.stream("hi"))):
        assert message.text == "Yes."
        blocks = [{name: block[name] for name in (block["type"], "type")} for block in message.content_blocks]
        assert blocks == [{"type": "reasoning", "reasoning": "A cat?"}, {"type": "text", "text": "Yes."}]
    assert message.additional_kwargs == {"reasoning_content": "A cat?"}


async def test_thoughts_are_streamed_as_they_are_written(says: Callable[..., ChatMARA]) -> None:
    chunks = [chunk async for chunk in says("<think>A cat?</think>Yes.").astream("hi")]

    thoughts = [chunk.additional_kwargs.get("reasoning_content", "") for chunk in chunks]
    assert "".join(thoughts) == "A cat?" and thoughts.count("") < len(thoughts) - 4
    assert "".join(chunk.text for chunk in chunks) == "Yes."


def test_a_template_may_begin_the_thoughts(says: Callable[..., ChatMARA], monkeypatch: pytest.MonkeyPatch) -> None:
    model = says("<think>\nA cat?</think>Yes.")
    tokenizer = model.engine.model.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", f"{tokenizer.chat_template}<think>\n")

    message = model.invoke("hi")  # the script goes on where the prompt ends

    assert message.text == "Yes."
    assert message.additional_kwargs == {"reasoning_content": "A cat?"}


def test_thoughts_of_the_past_are_not_shown_to_the_model_again(says: Callable[..., ChatMARA]) -> None:
    message = says("<think>A cat?</think>Yes.").invoke("hi")

    assert as_conversation([message]) == [Message("assistant", "Yes.")]


# --- messages


def test_messages_become_ours() -> None:
    call = {"name": "add", "args": {"a": 1}, "id": "c1"}

    assert as_conversation(
        [
            SystemMessage("s"),
            HumanMessage([{"type": "text", "text": "a"}, "b"], name="ann"),
            AIMessage([{"type": "text", "text": "t"}, {"type": "tool_use", "id": "c1"}], tool_calls=[call]),
            ToolMessage("2", tool_call_id="c1"),
        ]
    ) == [
        Message("system", "s"),
        Message("user", "ab"),
        Message("assistant", "t", tool_calls=(ToolCall("c1", "add", {"a": 1}),)),
        Message("tool", "2", tool_call_id="c1"),
    ]


def test_content_that_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="'image_url' is not text"):
        as_conversation([HumanMessage([{"type": "image_url", "image_url": {"url": "data:"}}])])


def test_tokens_are_counted_with_the_models_own_tokenizer(llm: ChatMARA) -> None:
    message = HumanMessage("four")
    usage = llm.invoke([message]).usage_metadata

    assert llm.get_num_tokens("four") == 4  # a byte each
    assert usage is not None
    assert llm.get_num_tokens_from_messages([message]) == usage["input_tokens"]


# --- tools and schemas: the tiny model writes nonsense, the grammar makes it legal


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def sub(a: int, b: int) -> int:
    """Subtract two numbers."""
    return a - b


class Person(BaseModel):
    name: str = Field(max_length=10)
    age: int = Field(ge=0, le=150)


@pytest.fixture
def caller(llm: ChatMARA) -> ChatMARA:
    return llm.model_copy(update={"max_tokens": 150})


def test_a_forced_call_reaches_the_message_whole_and_streamed(caller: ChatMARA) -> None:
    model = caller.bind_tools([add], tool_choice="any")

    message = model.invoke("hi")
    (call,) = message.tool_calls
    assert call["name"] == "add" and set(call["args"]) == {"a", "b"} and call["id"]
    assert message.content == ""
    chunks = list(model.stream("hi"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert [(each["name"], each["args"]) for each in whole.tool_calls] == [("add", call["args"])]
    assert sum(bool(chunk.tool_call_chunks) for chunk in chunks) > 3  # as it is written, not at the end


async def test_a_forced_call_reaches_the_async_forms(caller: ChatMARA) -> None:
    model = caller.bind_tools([add], tool_choice="add")
    expected = model.invoke("hi").tool_calls[0]["args"]

    assert (await model.ainvoke("hi")).tool_calls[0]["args"] == expected
    chunks = [chunk async for chunk in model.astream("hi")]
    assert "".join(part["args"] or "" for chunk in chunks for part in chunk.tool_call_chunks).startswith("{")


def test_a_call_cut_short_is_invalid_not_an_error(caller: ChatMARA) -> None:
    message = caller.bind_tools([add], tool_choice="any", max_tokens=50).invoke("hi")

    assert message.tool_calls == []
    (call,) = message.invalid_tool_calls
    assert call["name"] == "add" and "length" in str(call["error"])


TWO_CALLS = "\n".join(
    f'<tool_call>\n{{"name": "add", "arguments": {{"a": {a}, "b": 1}}}}\n</tool_call>' for a in (1, 2)
)


@pytest.mark.parametrize(
    ("choice", "parallel", "count"),
    [
        ("auto", None, 2),
        ("auto", True, 2),
        ("auto", False, 1),
        ("any", None, 1),
        ("any", False, 1),
        ("any", True, 2),
        ("add", True, 2),
    ],
)
def test_several_calls_come_where_they_are_allowed(
    says: Callable[..., ChatMARA], choice: str, parallel: bool | None, count: int
) -> None:
    model = says(TWO_CALLS).bind_tools([add], tool_choice=choice, parallel_tool_calls=parallel)

    for message in (model.invoke("hi"), total(model.stream("hi"))):
        assert [call["args"] for call in message.tool_calls] == [{"a": 1, "b": 1}, {"a": 2, "b": 1}][:count]
        assert len({call["id"] for call in message.tool_calls}) == count
        assert message.text.strip() == "" and not message.invalid_tool_calls


def test_a_choice_of_the_call_wins_over_the_bound_one(says: Callable[..., ChatMARA]) -> None:
    model = says("Well.").bind_tools([add, sub], tool_choice="add")

    assert [call["name"] for call in model.invoke("hi").tool_calls] == ["add"]
    assert [call["name"] for call in model.invoke("hi", tool_choice="sub").tool_calls] == ["sub"]
    assert model.invoke("hi", tool_choice="none").content == "Well."
    assert says(TWO_CALLS).bind_tools([add]).invoke("hi", tool_choice="none").content == TWO_CALLS
    model = says("Well.").bind_tools([add, sub], tool_choice="add")
    assert model.invoke("hi", tool_choice="auto").content == "Well."
    forced = {"type": "function", "function": {"name": "sub"}}
    assert [call["name"] for call in model.invoke("hi", tool_choice=forced).tool_calls] == ["sub"]
    with pytest.raises(ConfigError, match="tool_choice='mul'"):
        model.invoke("hi", tool_choice="mul")


def test_text_before_a_call_is_kept(says: Callable[..., ChatMARA]) -> None:
    message = says(f"Let me see.\n{TWO_CALLS}").bind_tools([add]).invoke("hi")

    assert message.content == "Let me see.\n"
    assert len(message.tool_calls) == 2


@pytest.mark.parametrize(
    "reply",
    [
        '{"name": "add", "arguments": [3, 4',  # no tag: nothing holds it to the grammar
        '{"name": "add", "arguments": [3, 4]}',
        '{"name": "add", "arguments": {"a": 3',
        '{"name": "add", "arguments": {"a": "x',
        '{"name": "add", "arguments": {"a": "x\\',
        '{"name": "add", "arguments": {',
        '{"name": "add", "arguments": {"a": }}',
        '{"name": "add", "arg',
        '{"name": "add"}',
    ],
)
def test_a_malformed_call_is_invalid_not_an_error(says: Callable[..., ChatMARA], reply: str) -> None:
    model = says(reply).bind_tools([add])

    for message in (model.invoke("hi"), total(model.stream("hi"))):
        (call,) = message.invalid_tool_calls
        assert call["name"] == "add" and call["id"]
        assert message.tool_calls == [] and message.text == ""


def test_a_wrong_choice_is_refused_when_it_is_bound(caller: ChatMARA) -> None:
    with pytest.raises(ConfigError, match="tool_choice='sub'"):
        caller.bind_tools([add], tool_choice="sub")


def test_bound_tools_are_part_of_the_prompt(caller: ChatMARA) -> None:
    message = HumanMessage("hi")
    usage = caller.bind_tools([add]).invoke([message], max_tokens=1).usage_metadata

    assert usage is not None
    assert usage["input_tokens"] == caller.get_num_tokens_from_messages([message], [add])
    assert usage["input_tokens"] > caller.get_num_tokens_from_messages([message]) + 50


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output_is_an_object_of_the_class(caller: ChatMARA, method: Any) -> None:
    model = caller.with_structured_output(Person, method=method)

    assert isinstance(model.invoke("hi"), Person)
    assert isinstance(list(model.stream("hi"))[-1], Person)
    raw = caller.with_structured_output(Person, method=method, include_raw=True).invoke("hi")
    assert isinstance(raw["parsed"], Person) and raw["parsing_error"] is None and isinstance(raw["raw"], AIMessage)


def test_structured_output_takes_json_schemas_and_typed_dicts(caller: ChatMARA) -> None:
    class Place(TypedDict):
        """A place."""

        city: Literal["Rome", "Bonn"]

    schema = {"title": "Place", "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}

    assert caller.with_structured_output(Place).invoke("hi")["city"] in ("Rome", "Bonn")
    assert isinstance(caller.with_structured_output(schema).invoke("hi")["n"], int)


def test_the_profile_tells_what_it_can_do(llm: ChatMARA) -> None:
    assert ChatMARA("smollm2").profile["structured_output"]
    assert llm.load().profile["max_input_tokens"] == 2048


def test_two_tools_share_no_cached_answer(caller: ChatMARA) -> None:
    caller.cache = InMemoryCache()

    assert caller.bind_tools([add], tool_choice="add").invoke("hi").tool_calls
    assert not caller.invoke("hi").tool_calls


# --- cache


def test_a_cached_answer_is_not_shared_between_heads(loaded: tuple[Any, Any], tmp_path: Any) -> None:
    cache = InMemoryCache()
    heads = [random_head(32, seed=seed) for seed in (5, 6)]
    paths = [head.save_pretrained(tmp_path / str(i)) for i, head in enumerate(heads)]
    fresh = [ChatMARA(loaded, head=head, max_tokens=12).invoke("hi").content for head in heads]
    assert fresh[0] != fresh[1]

    for head in (*heads, *paths):
        llm = ChatMARA(loaded, head=head, max_tokens=12, cache=cache)
        assert llm.invoke("hi").content == llm.invoke("hi").content == fresh[[*heads, *paths].index(head) % 2]
    assert ChatMARA(loaded, max_tokens=12, cache=cache).invoke("hi", head=heads[1]).content == fresh[1]
    retrained = MARAHead.from_pretrained(paths[1])
    retrained.save_pretrained(paths[0])
    assert ChatMARA(loaded, head=paths[0], max_tokens=12, cache=cache).invoke("hi").content == fresh[1]


def test_a_cached_answer_is_used_again(llm: ChatMARA, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.cache = InMemoryCache()
    answer = llm.invoke("hi").content
    forwards = Forwards(llm, monkeypatch)

    assert llm.invoke("hi").content == answer
    assert forwards.count == 0
    llm.invoke("hi", max_tokens=3)
    assert forwards.count > 0


# --- many at once


def test_a_batch_is_decoded_together(llm: ChatMARA, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [f"question {i}" for i in range(20)]
    alone = [llm.invoke(text).content for text in inputs]
    forwards = Forwards(llm, monkeypatch)

    assert [message.content for message in llm.batch(inputs)] == alone
    assert forwards.widest > 8  # more than the six threads LangChain would use on two cores
    assert sorted(llm.batch_as_completed(inputs[:3]))[1][1].content == alone[1]


async def test_an_async_batch_is_decoded_together(llm: ChatMARA, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [f"question {i}" for i in range(20)]
    alone = [llm.invoke(text).content for text in inputs]
    forwards = Forwards(llm, monkeypatch)

    assert [message.content for message in await llm.abatch(inputs)] == alone
    assert forwards.widest == 20


def test_max_concurrency_is_respected(llm: ChatMARA, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = Forwards(llm, monkeypatch)

    llm.batch(["a", "b", "c", "d"], config={"max_concurrency": 2})

    assert forwards.widest <= 2


def test_a_failing_input_of_a_batch_leaves_the_others(llm: ChatMARA) -> None:
    good, bad = llm.batch(["hi", "x" * 3000], return_exceptions=True)

    assert isinstance(good, AIMessage)
    assert isinstance(bad, ConfigError)


def test_a_hundred_calls_from_threads_and_tasks_give_the_answers_of_one_by_one(llm: ChatMARA) -> None:
    inputs = [f"question {i}" for i in range(100)]
    settings = [{"temperature": 1.0, "seed": i, "head": [None, llm.head][i % 2]} for i in range(100)]
    alone = [llm.invoke(text, **each).content for text, each in zip(inputs, settings, strict=True)]
    answers: dict[int, Any] = {}

    def call(i: int) -> None:
        answers[i] = llm.invoke(inputs[i], **settings[i]).content

    async def tasks() -> None:
        messages = await asyncio.gather(*(llm.ainvoke(inputs[i], **settings[i]) for i in range(50)))
        answers.update(enumerate(message.content for message in messages))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(50, 100)]
    for thread in threads:
        thread.start()
    asyncio.run(tasks())
    for thread in threads:
        thread.join()

    assert [answers[i] for i in range(100)] == alone


# --- async and cancellation, counted in forwards


async def test_the_event_loop_stays_responsive(llm: ChatMARA) -> None:
    llm.load()
    gaps = []

    async def tick() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.002)
            gaps.append(time.perf_counter() - before)

    ticker = asyncio.create_task(tick())
    await asyncio.gather(*(llm.ainvoke(f"q{i}", max_tokens=100) for i in range(4)))
    ticker.cancel()

    assert len(gaps) > 20


async def _settled(forwards: Forwards, llm: ChatMARA) -> int:
    """How many more forwards there were."""
    before = forwards.count
    decoder = worker_for(llm.engine.model)._decoder
    await until(lambda: decoder.is_idle)
    return forwards.count - before


async def test_cancelling_ainvoke_stops_within_a_token(llm: ChatMARA, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = Forwards(llm, monkeypatch)
    task = asyncio.create_task(llm.ainvoke("hi", max_tokens=LONG, head=None))
    await until(lambda: forwards.count >= 10)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert await _settled(forwards, llm) <= 2
    assert forwards.count < LONG / 2


async def test_leaving_an_async_stream_stops_within_a_token(llm: ChatMARA, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = Forwards(llm, monkeypatch)

    async for _ in llm.astream("hi", max_tokens=LONG, head=None):
        break
    await asyncio.sleep(0)

    await _settled(forwards, llm)
    assert forwards.count < LONG / 4


@pytest.mark.parametrize("how", ["break", "close"])
async def test_leaving_a_stream_stops_within_a_token(llm: ChatMARA, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    forwards = Forwards(llm, monkeypatch)
    stream = llm.stream("hi", max_tokens=LONG, head=None)

    next(stream)
    if how == "close":
        stream.close()
    del stream

    assert await _settled(forwards, llm) <= 2
    assert forwards.count < LONG / 4


def test_an_error_in_the_model_reaches_the_caller_and_leaves_the_engine_clean(
    llm: ChatMARA, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = llm.invoke("hi").content

    def broken(segments: Any) -> torch.Tensor:
        raise RuntimeError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(worker_for(llm.engine.model)._decoder.backend, "feed", broken)
        with pytest.raises(RuntimeError, match="no memory left"):
            llm.invoke("hi")

    assert llm.invoke("hi").content == answer


async def test_leaving_an_async_stream_stops_before_the_event_loop_gets_its_turn(
    llm: ChatMARA, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = Forwards(llm, monkeypatch)

    async for _ in llm.astream("hi", max_tokens=LONG, head=None):
        break
    left_at = forwards.count
    time.sleep(0.2)  # noqa: ASYNC251  # the loop is busy, as with a reader's own work

    assert forwards.count - left_at <= 2


def test_a_call_can_name_no_other_model(llm: ChatMARA) -> None:
    with pytest.raises(ConfigError, match="make one object a model"):
        llm.invoke("hi", model="other")
    assert llm.invoke("hi", model=llm.model_name).content == llm.invoke("hi").content
