"""LlamaIndex' LLM on vLLM in this process; what it does on the other engines is in `tests/frameworks`."""

from __future__ import annotations

import asyncio

import llama_index.core
import pytest
from llama_index.core import Document, Settings, SummaryIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index_tools import Person, check_a_required_call
from pydantic import BaseModel, Field

from mara_integrations.errors import ConfigError
from mara_integrations.frameworks.llama_index import GatedLLM

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of vLLM and what it imports
    pytest.mark.timeout(900),  # vLLM starts in 20 s on an idle machine
]
KWARGS = {"max_model_len": 1024, "kv_cache_memory_bytes": 1 << 28}


@pytest.fixture(autouse=True)
def untouched_settings(monkeypatch):
    monkeypatch.setattr(llama_index.core, "global_tokenizer", None)
    monkeypatch.setattr(Settings, "_llm", None)


@pytest.fixture(scope="module")
def loaded(served, environment):
    """Keeps the model loaded."""
    root, _, heads = served
    llm = GatedLLM(str(root / "tiny"), engine="vllm", model_kwargs=KWARGS, head=heads["q0"], max_tokens=12, top_k=8)
    with llm.engine.load():
        yield llm


@pytest.fixture
def llm(loaded):
    return loaded.model_copy()


@pytest.fixture
def caller(loaded):
    return loaded.model_copy(update={"max_tokens": 300})


def test_all_eight_calls_give_one_answer(llm):
    messages = [ChatMessage("hi")]
    answer = llm.complete("hi").text

    async def asynchronous():
        return [
            (await llm.acomplete("hi")).text,
            (await llm.achat(messages)).message.content,
            "".join([part.delta async for part in await llm.astream_complete("hi")]),
            "".join([part.delta async for part in await llm.astream_chat(messages)]),
        ]

    assert answer == llm.chat(messages).message.content != llm.chat(messages, head=None).message.content
    assert answer == "".join(part.delta for part in llm.stream_complete("hi"))
    assert answer == "".join(part.delta for part in llm.stream_chat(messages))
    assert asyncio.run(asynchronous()) == [answer] * 4


def test_streams_carry_the_whole_text_so_far_and_the_report_last(llm):
    *parts, last = llm.stream_chat([ChatMessage("hi")])

    text = ""
    for part in (*parts, last):
        text += part.delta
        assert part.message.content == text
    assert parts and all(part.raw is None for part in parts)
    assert last.raw["finish_reason"] == "length"
    assert last.raw["usage"]["completion_tokens"] == len(last.raw["token_ids"]) == 12


def test_settings_of_a_call_take_effect(llm):
    messages = [ChatMessage("hi")]
    base = llm.chat(messages, head=None).message.content

    assert llm.complete("hi", formatted=True).raw["usage"]["prompt_tokens"] == 2  # no chat template
    assert len(llm.chat(messages, max_tokens=3).raw["token_ids"]) == 3
    assert llm.chat(messages, strength=0).message.content == base
    assert llm.complete("hi", stop=[base[2:5]], head=None).text == base[: base.find(base[2:5])]
    sampled = {llm.complete("hi", head=None, temperature=2.0, top_p=1.0, seed=seed).text for seed in (1, 1, 2)}
    assert len(sampled) == 2
    assert llm.metadata.context_window == 1024
    with pytest.raises(ConfigError, match="temprature"):
        llm.complete("hi", temprature=1)


@pytest.mark.usefixtures("event_loop")
def test_a_query_engine_answers_with_it(llm):
    index = SummaryIndex.from_documents([Document(text="Support answers by email.")])

    answer = index.as_query_engine(llm=llm).query("How?")
    streamed = index.as_query_engine(llm=llm, streaming=True).query("How?")

    assert str(answer) == "".join(streamed.response_gen) != ""


# --- tools and schemas: the tiny model writes nonsense, the grammar makes it legal


def test_a_required_call_is_made_and_run(caller):
    check_a_required_call(caller)


async def test_structured_prediction_gives_the_class(caller):
    template = PromptTemplate("{config}")

    assert isinstance(caller.structured_predict(Person, template, config="hi"), Person)
    assert isinstance(await caller.astructured_predict(Person, template, config="hi"), Person)
    *partial, last = caller.stream_structured_predict(Person, template, config="hi")
    assert partial and isinstance(last, Person)


async def test_an_agent_calls_its_tool(caller):
    called = []

    def note(text: str) -> str:
        """Note a text."""
        called.append(text)
        return "noted"

    class Note(BaseModel):
        text: str = Field(max_length=8)  # a random model ends no string by itself

    tool = FunctionTool.from_defaults(note, fn_schema=Note)
    await FunctionAgent(llm=caller, tools=[tool], initial_tool_choice="note").run("hi")

    assert called and all(called)  # it may call several times in one reply


async def until(condition):
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


async def test_a_task_that_is_cancelled_leaves_nothing_to_decode(llm):
    task = asyncio.create_task(llm.achat([ChatMessage("hi")], max_tokens=900))
    await until(lambda: llm.engine.status.num_live)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    await until(lambda: not llm.engine.status.num_live)
    assert len(llm.chat([ChatMessage("hi")]).raw["token_ids"]) == 12
