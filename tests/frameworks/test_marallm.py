from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, Runnable, RunnableLambda
from llama_index.core import Document, Settings, SummaryIndex
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate

import mara_integrations
from mara_integrations import MARALLM, ChatMARA, MARAEngine
from mara_integrations.errors import ConfigError
from mara_integrations.testing import random_head


@pytest.fixture
def llm(loaded: tuple[Any, Any]) -> MARALLM:
    return MARALLM(loaded, head=random_head(32), max_tokens=12)


def test_both_frameworks_and_the_engine_give_one_answer(llm: MARALLM) -> None:
    answer = llm.invoke("hi").content

    assert answer == llm.complete("hi").text
    assert answer == llm.chat([ChatMessage("hi")]).message.content
    assert answer == llm.as_langchain().invoke("hi").content
    engine = MARAEngine(llm.model, llm.head, max_new_tokens=12)
    assert answer == engine.generate([mara_integrations.messages.Message("user", "hi")]).text


def test_it_is_a_runnable_and_settings_keep_it(llm: MARALLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_llm", None)

    Settings.llm = llm

    assert isinstance(llm, Runnable)
    assert Settings.llm is llm


@pytest.mark.usefixtures("event_loop")
def test_a_chain_and_a_query_engine_run_on_it(llm: MARALLM) -> None:
    chain = ChatPromptTemplate.from_messages([("human", "{q}")]) | llm | StrOutputParser()
    answer = chain.invoke({"q": "hi"})

    assert answer == llm.complete("hi").text
    assert "".join(chain.stream({"q": "hi"})) == answer
    assert chain.batch([{"q": "hi"}] * 2) == [answer] * 2
    index = SummaryIndex.from_documents([Document(text="Support answers by email.")])
    assert str(index.as_query_engine(llm=llm).query("How?"))


async def test_async_chains_and_query_engines_run_on_it(llm: MARALLM) -> None:
    chain = ChatPromptTemplate.from_messages([("human", "{q}")]) | llm | StrOutputParser()
    answer = llm.complete("hi").text

    assert await chain.ainvoke({"q": "hi"}) == answer
    assert "".join([piece async for piece in chain.astream({"q": "hi"})]) == answer
    assert await chain.abatch([{"q": "hi"}]) == [answer]
    index = SummaryIndex.from_documents([Document(text="Support answers by email.")])
    assert str(await index.as_query_engine(llm=llm).aquery("How?"))


def test_stream_serves_both_frameworks(llm: MARALLM) -> None:
    answer = llm.complete("hi").text
    template = PromptTemplate("hi")

    assert "".join(llm.stream(template)) == "".join(llm.stream(prompt=template)) == answer
    chunks = list(llm.stream("hi"))
    assert all(isinstance(chunk, AIMessageChunk) for chunk in chunks)
    assert "".join(chunk.text for chunk in chunks) == answer
    assert "".join(chunk.text for chunk in llm.stream(input="hi", config={"tags": ["t"]})) == answer


async def test_astream_is_awaited_by_one_framework_and_iterated_by_the_other(llm: MARALLM) -> None:
    answer = llm.complete("hi").text

    assert "".join([piece async for piece in await llm.astream(PromptTemplate("hi"))]) == answer
    assert "".join([chunk.text async for chunk in llm.astream("hi")]) == answer
    assert "".join([chunk.text async for chunk in llm.astream(input="hi", config=None)]) == answer


async def test_template_variables_may_be_called_config_and_input(llm: MARALLM) -> None:
    template = PromptTemplate("{config} and {input}")
    answer = llm.complete("a and b").text

    assert "".join(llm.stream(template, config="a", input="b")) == answer
    assert "".join([piece async for piece in await llm.astream(template, config="a", input="b")]) == answer
    assert llm.predict(template, config="a", input="b") == answer


def test_a_changed_field_takes_effect_in_both_halves(llm: MARALLM) -> None:
    llm.invoke("hi")
    short = llm.model_copy(update={"max_tokens": 3})
    llm.max_tokens = 5

    for each, length in ((short, 3), (llm, 5)):
        assert len(each.invoke("hi").response_metadata["token_ids"]) == length
        assert len(each.complete("hi").raw["token_ids"]) == length
    assert short.engine.model is llm.engine.model


def test_copies_share_the_weights(llm: MARALLM) -> None:
    answer = llm.complete("hi").text

    for twin in (copy.copy(llm), copy.deepcopy(llm), llm.model_copy(deep=True)):
        assert twin.model[0] is llm.model[0] and twin.head is llm.head
        assert twin.complete("hi").text == twin.invoke("hi").content == answer


def test_pickling_keeps_the_settings_and_refuses_weights(llm: MARALLM) -> None:
    named = MARALLM("smollm2", temperature=0.5, stop=["x"], system_prompt="s")
    twin = pickle.loads(pickle.dumps(named))

    assert isinstance(twin, MARALLM)
    assert (twin.model, twin.temperature, twin.stop, twin.system_prompt) == ("smollm2", 0.5, ["x"], "s")
    with pytest.raises(ConfigError, match="not pickled"):
        pickle.dumps(llm)


def test_settings_survive_llama_indexs_dict() -> None:
    named = MARALLM("smollm2", temperature=0.5, head="heads/x")

    assert MARALLM.from_dict(named.to_dict()).head == "heads/x"


def test_an_access_token_reaches_no_trace() -> None:
    named = MARALLM("smollm2", model_kwargs={"token": "secret"})

    seen = (named.to_payload(), named.as_langchain()._identifying_params, named.as_langchain()._get_llm_string(), named)
    assert "secret" not in repr(seen)


def test_runnable_methods_reach_the_chat_model(llm: MARALLM) -> None:
    answer = llm.invoke("hi").content

    assert llm.bind(max_tokens=2).invoke("hi").response_metadata["gate"]
    assert llm.with_retry().invoke("hi").content == answer
    assert llm.with_fallbacks([llm]).invoke("hi").content == answer
    assert llm.map().invoke(["hi", "hi"])[1].content == answer
    assert (RunnableLambda(str.lower) | llm).invoke("HI").content == answer
    assert [i for i, _ in sorted(llm.batch_as_completed(["hi", "hi"]))] == [0, 1]
    chat = llm.configurable_fields(max_tokens=ConfigurableField("length"))
    short = chat.invoke("hi", config={"configurable": {"length": 3}})
    assert isinstance(short, AIMessage)
    assert len(short.response_metadata["token_ids"]) == 3
    assert llm._llm_type == "mara"


async def test_events_are_streamed(llm: MARALLM) -> None:
    kinds = [event["event"] async for event in llm.astream_events("hi", version="v2")]

    assert kinds[0] == "on_chat_model_start" and kinds[-1] == "on_chat_model_end"
    assert "on_chat_model_stream" in kinds


def test_as_langchain_is_a_chat_model_on_the_same_engine(llm: MARALLM) -> None:
    chat = llm.as_langchain()

    assert isinstance(chat, ChatMARA)
    assert chat.engine is llm.engine


COMPANIONS = "langchain langgraph langchain_tests llama_index.retrievers llama_index.embeddings llama_index.llms"
RUNS = """
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from llama_index.core import Document, SummaryIndex
from mara_integrations import MARALLM
from mara_integrations.testing import tiny_model, tiny_tokenizer

llm = MARALLM((tiny_model(max_position_embeddings=2048), tiny_tokenizer()), max_tokens=3)
answer = (ChatPromptTemplate.from_messages([("human", "{q}")]) | llm | StrOutputParser()).invoke({"q": "hi"})
assert answer == llm.complete("hi").text
assert str(SummaryIndex.from_documents([Document(text="a")]).as_query_engine(llm=llm).query("hi"))
assert llm.as_langchain().bind_tools([{"title": "f", "type": "object", "properties": {}}])
"""


WITHOUT = {
    COMPANIONS: RUNS,
    "llama_index": "from mara_integrations import ChatMARA; ChatMARA('m').bind(max_tokens=2)",
    "langchain_core langchain": (
        "from mara_integrations.frameworks.llama_index import GatedLLM; GatedLLM('m', max_tokens=2)"
    ),
}
# One process reads torch and transformers, which takes seconds; each case is a fork of it, with imports of its own.
IN_FORKS = """
import json, os, sys
import torch, transformers.modeling_utils

class Blocker:
    def __init__(self, blocked):
        self.blocked = blocked.split()

    def find_spec(self, name, path=None, target=None):
        if any(name == each or name.startswith(each + ".") for each in self.blocked):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"mara_integrations", "llama_index", "langchain", "langchain_core", "langgraph"}, loaded
for blocked, code in json.loads(sys.argv[1]).items():
    child = os.fork()
    if not child:
        sys.meta_path.insert(0, Blocker(blocked))
        exec(code, {})
        sys.exit()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"fails without {blocked}"
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_it_works_without_what_it_does_not_need() -> None:
    subprocess.run([sys.executable, "-c", IN_FORKS, json.dumps(WITHOUT)], check=True)


def test_langchains_cache_and_callbacks_are_carried_along(loaded: tuple[Any, Any]) -> None:
    usage, cache = UsageMetadataCallbackHandler(), InMemoryCache()
    llm = MARALLM(loaded, max_tokens=3, cache=cache, callbacks=[usage])

    first, second = llm.invoke("hi"), llm.invoke("hi")

    assert first.content == second.content
    (answer,) = cache._cache.values()
    assert answer[0].text == first.content
    (counts,) = usage.usage_metadata.values()
    assert counts["output_tokens"] >= 3


def test_the_chat_model_is_made_once_until_a_setting_changes(llm: MARALLM) -> None:
    chat = llm.as_langchain()

    assert llm.as_langchain() is chat
    llm.stop = ["x"]
    assert llm.as_langchain() is not chat and llm.as_langchain().stop == ["x"]
    with pytest.raises(AttributeError, match="no_such_thing"):
        llm.no_such_thing  # noqa: B018
