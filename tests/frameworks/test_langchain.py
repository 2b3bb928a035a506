"""`ChatMARA`: settings, answers, messages and cached answers."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from mara_integrations import ChatMARA
from mara_integrations.errors import ConfigError, HeadError
from mara_integrations.frameworks.langchain import as_conversation
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Message, ToolCall
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer

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


def test_a_call_can_name_no_other_model(llm: ChatMARA) -> None:
    with pytest.raises(ConfigError, match="make one object a model"):
        llm.invoke("hi", model="other")
    assert llm.invoke("hi", model=llm.model_name).content == llm.invoke("hi").content


def test_the_profile_tells_what_it_can_do(llm: ChatMARA) -> None:
    assert ChatMARA("smollm2").profile["structured_output"]
    assert llm.load().profile["max_input_tokens"] == 2048


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


def test_a_cached_answer_is_used_again(llm: ChatMARA, count_forwards: Any) -> None:
    llm.cache = InMemoryCache()
    answer = llm.invoke("hi").content
    forwards = count_forwards(llm)

    assert llm.invoke("hi").content == answer
    assert forwards.count == 0
    llm.invoke("hi", max_tokens=3)
    assert forwards.count > 0
