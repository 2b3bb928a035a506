"""LlamaIndex' LLM on a tiny random model, on each engine that runs without a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import llama_index.core
import pytest
from llama_index.core import Document, Settings, SummaryIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import ChatResponse, ImageBlock, TextBlock, ToolCallBlock
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import ChatMessage, MessageRole
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index_tools import TOOL, Person, check_a_required_call
from pydantic import BaseModel, Field

from mara_integrations.errors import ConfigError
from mara_integrations.frameworks.llama_index import GatedLLM, as_conversation
from mara_integrations.messages import Message, ToolCall
from mara_integrations.runtime import MARAEngine
from mara_integrations.testing import random_head

LONG = 300  # tokens


@pytest.fixture(autouse=True)
def untouched_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_index.core, "global_tokenizer", None)


@pytest.fixture(scope="module")
def on_transformers(loaded: tuple[Any, Any]) -> dict[str, Any]:
    return {"model": loaded}


@pytest.fixture(scope="module")
def on_llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    if not any(map(find_spec, ("llama_cpp", "xllamacpp"))):
        pytest.skip("llama.cpp is not installed")
    from tiny_gguf import oracle, write_gguf

    folder = tmp_path_factory.mktemp("gguf")
    path = write_gguf(folder / "tiny.gguf", oracle(max_position_embeddings=2048))
    settings = {"model": str(path), "engine": "llama.cpp", "model_kwargs": {"n_threads": 1, "flash_attn": False}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARA_CACHE_DIR", str(folder / "cache"))
        with MARAEngine(**settings).load():  # stays loaded for all tests
            yield settings


@pytest.fixture(params=["on_transformers", "on_llama_cpp"])
def llm(request: pytest.FixtureRequest) -> GatedLLM:
    return GatedLLM(**request.getfixturevalue(request.param), head=random_head(32), max_tokens=12)


@pytest.fixture
def events() -> Any:
    """Names of the instrumentation events that were fired."""
    seen: list[str] = []

    class Handler(BaseEventHandler):
        def handle(self, event: Any, **kwargs: Any) -> None:
            seen.append(event.class_name())

    handler, root = Handler(), get_dispatcher()
    root.add_event_handler(handler)
    yield seen
    root.event_handlers.remove(handler)


def test_it_is_a_function_calling_llm() -> None:
    names = [base.__name__ for base in GatedLLM.__mro__]

    assert BaseLLM.__name__ in names and FunctionCallingLLM.__name__ in names


def test_all_eight_calls_give_one_answer(llm: GatedLLM) -> None:
    messages = [ChatMessage("hi")]
    answer = llm.complete("hi").text

    async def asynchronous() -> list[str]:
        return [
            (await llm.acomplete("hi")).text,
            (await llm.achat(messages)).message.content,
            "".join([part.delta async for part in await llm.astream_complete("hi")]),
            "".join([part.delta async for part in await llm.astream_chat(messages)]),
        ]

    assert answer == llm.chat(messages).message.content
    assert answer == "".join(part.delta for part in llm.stream_complete("hi"))
    assert answer == "".join(part.delta for part in llm.stream_chat(messages))
    assert asyncio.run(asynchronous()) == [answer] * 4


def test_streams_carry_the_whole_text_so_far_and_the_report_last(llm: GatedLLM) -> None:
    *parts, last = llm.stream_chat([ChatMessage("hi")])

    text = ""
    for part in (*parts, last):
        text += part.delta
        assert part.message.content == text
        assert part.message.role == MessageRole.ASSISTANT
    assert all(part.raw is None for part in parts)
    assert last.raw["finish_reason"] == "length"
    assert last.raw["usage"]["completion_tokens"] == len(last.raw["token_ids"]) == 12
    assert last.raw["gate"]["rejected"] > 0
    assert list(llm.stream_complete("hi"))[-1].text == text


def test_formatted_text_is_fed_raw(llm: GatedLLM) -> None:
    raw = llm.complete("hi", formatted=True)

    assert raw.raw["usage"]["prompt_tokens"] == 2  # no chat template, no system prompt
    assert raw.text != llm.complete("hi").text
    assert raw.text == llm.complete("hi", raw=True).text == llm.engine.generate("hi", raw=True).text
    assert "".join(part.delta for part in llm.stream_complete("hi", formatted=True)) == raw.text


def test_a_system_prompt_stands_before_conversations_once(llm: GatedLLM) -> None:
    plain = llm.complete("hi").raw["usage"]["prompt_tokens"]
    llm.system_prompt = "Be brief."
    system = len("[system] Be brief.\n")

    assert llm.complete("hi").raw["usage"]["prompt_tokens"] == plain + system
    assert llm.complete("hi", formatted=True).raw["usage"]["prompt_tokens"] == 2
    own = [ChatMessage("Be brief.", role="system"), ChatMessage("hi")]
    assert llm.chat(own).raw["usage"]["prompt_tokens"] == plain + system
    assert llm.predict(PromptTemplate("hi")) == llm.chat(own).message.content


def test_templates_of_the_users_own_are_used(loaded: tuple[Any, Any]) -> None:
    llm = GatedLLM(
        loaded,
        max_tokens=4,
        messages_to_prompt=lambda messages: "".join(m.content for m in messages),
        completion_to_prompt=lambda prompt: f">{prompt}",
    )

    assert llm.chat([ChatMessage("hi")]).raw["usage"]["prompt_tokens"] == 2
    assert llm.complete("hi").raw["usage"]["prompt_tokens"] == 3


def test_settings_of_a_call_take_effect(llm: GatedLLM) -> None:
    messages = [ChatMessage("hi")]
    base = llm.chat(messages, head=None).message.content

    assert len(llm.chat(messages, max_tokens=3).raw["token_ids"]) == 3
    assert len(llm.complete("hi", max_new_tokens=3).raw["token_ids"]) == 3
    assert llm.chat(messages, strength=0).message.content == base != llm.chat(messages).message.content
    assert llm.complete("hi", stop=[base[2:5]], head=None).text == base[: base.find(base[2:5])]
    assert "trace" in llm.complete("hi", trace=True).raw
    sampled = {llm.complete("hi", head=None, temperature=3.0, top_p=1.0, seed=seed).text for seed in (1, 1, 2)}
    assert len(sampled) == 2
    with pytest.raises(ConfigError, match="temprature"):
        llm.complete("hi", temprature=1)


def test_metadata_tells_the_true_context_window(llm: GatedLLM) -> None:
    assert llm.metadata.context_window == 2048
    assert llm.metadata.num_output == 12
    assert llm.metadata.is_chat_model


@pytest.mark.parametrize("call", ["chat", "complete", "stream_chat", "stream_complete"])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_call_is_one_pair_of_events(llm: GatedLLM, events: list[str], call: str, is_async: bool) -> None:
    prompt: Any = [ChatMessage("hi")] if "chat" in call else "hi"

    async def asynchronous() -> None:
        answer = await getattr(llm, f"a{call}")(prompt)
        if "stream" in call:
            assert len([part async for part in answer]) > 1

    if is_async:
        asyncio.run(asynchronous())
    elif "stream" in call:
        assert len(list(getattr(llm, call)(prompt))) > 1
    else:
        getattr(llm, call)(prompt)

    kind = "LLMChat" if "chat" in call else "LLMCompletion"
    assert [event for event in events if "InProgress" not in event] == [f"{kind}StartEvent", f"{kind}EndEvent"]
    assert (f"{kind}InProgressEvent" in events) == ("stream" in call)


def test_the_rate_limiter_is_asked_once_a_call(llm: GatedLLM) -> None:
    class Limiter:
        count = 0

        def acquire(self) -> None:
            self.count += 1

    llm.rate_limiter = Limiter()
    llm.complete("hi")
    llm.chat([ChatMessage("hi")])

    assert llm.rate_limiter.count == 2


def test_tokens_reach_the_token_counter(llm: GatedLLM) -> None:
    counter = TokenCountingHandler(tokenizer=lambda text: list(text))
    llm.callback_manager = CallbackManager([counter])

    llm.chat([ChatMessage("hi")])

    assert counter.completion_llm_token_count == 12


@pytest.mark.usefixtures("event_loop")
def test_a_query_engine_answers_with_it(llm: GatedLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_llm", None)
    index = SummaryIndex.from_documents([Document(text="Support answers by email.")])

    answer = index.as_query_engine(llm=llm).query("How?")
    streamed = index.as_query_engine(llm=llm, streaming=True).query("How?")

    assert str(answer) == "".join(streamed.response_gen) != ""


def test_settings_keep_it(llm: GatedLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_llm", None)

    Settings.llm = llm

    assert Settings.llm is llm


def test_messages_become_ours() -> None:
    call = ToolCallBlock(tool_call_id="c1", tool_name="add", tool_kwargs='{"a": 1}')

    assert as_conversation(
        [
            ChatMessage("s", role="system"),
            ChatMessage([TextBlock(text="a"), TextBlock(text="b")]),
            ChatMessage([TextBlock(text="t"), call], role="assistant"),
            ChatMessage("2", role="tool", additional_kwargs={"tool_call_id": "c1"}),
        ]
    ) == [
        Message("system", "s"),
        Message("user", "a\nb"),
        Message("assistant", "t", tool_calls=(ToolCall("c1", "add", {"a": 1}),)),
        Message("tool", "2", tool_call_id="c1"),
    ]


def test_a_block_that_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="ImageBlock is not text"):
        as_conversation([ChatMessage([ImageBlock(image=b"png")])])


# --- tools and schemas: the tiny model writes nonsense, the grammar makes it legal


@pytest.fixture
def caller(llm: GatedLLM) -> GatedLLM:
    return llm.model_copy(update={"max_tokens": 150})


def test_a_required_call_is_made_and_run(caller: GatedLLM) -> None:
    check_a_required_call(caller)


def test_calls_can_be_read_while_they_are_written(caller: GatedLLM) -> None:
    seen = [
        caller.get_tool_calls_from_response(response, error_on_no_tool_call=False)
        for response in caller.stream_chat_with_tools([TOOL], "hi", tool_choice="add")
    ]

    assert any(calls and calls[0].tool_kwargs == {} for calls in seen)
    assert set(seen[-1][0].tool_kwargs) == {"a", "b"}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"a": 1}, {"a": 1}),
        ('{"a": 1, "b": "x', {"a": 1, "b": "x"}),
        ('{"a": [1, 2', {"a": [1, 2]}),
        ('{"a"', {}),
        ("", {}),
        ("[1]", {}),
        ("no JSON", {}),
    ],
)
def test_half_written_arguments_are_read_as_far_as_they_go(llm: GatedLLM, written: Any, read: dict[str, Any]) -> None:
    block = ToolCallBlock(tool_call_id="c1", tool_name="add", tool_kwargs=written)

    (call,) = llm.get_tool_calls_from_response(ChatResponse(message=ChatMessage([block], role="assistant")))

    assert call.tool_kwargs == read


def test_an_answer_without_a_call_is_an_error_where_one_is_needed(caller: GatedLLM) -> None:
    character_it_writes = caller.complete("hi").text[20]
    whole = caller.chat([ChatMessage("hi")], stop=[character_it_writes])
    with pytest.raises(ValueError, match="calls no tool"):
        caller.get_tool_calls_from_response(whole)

    cut = caller.chat([ChatMessage("hi")], max_tokens=10)
    with pytest.raises(ValueError, match="raise max_tokens"):
        caller.get_tool_calls_from_response(cut)


async def test_structured_prediction_gives_the_class(caller: GatedLLM) -> None:
    template = PromptTemplate("{config}")

    assert isinstance(caller.structured_predict(Person, template, config="hi"), Person)
    assert isinstance(await caller.astructured_predict(Person, template, config="hi"), Person)
    assert isinstance(caller.as_structured_llm(Person).complete("hi").raw, Person)


async def test_structured_prediction_streams_objects_that_grow(caller: GatedLLM) -> None:
    template = PromptTemplate("{config}")

    *partial, last = caller.stream_structured_predict(Person, template, config="hi")
    objects = [each async for each in await caller.astream_structured_predict(Person, template, config="hi")]

    assert partial and isinstance(last, Person)
    assert objects[-1] == last
    assert any(getattr(each, "age", None) is None and each.name for each in partial)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # it looks at all attributes
async def test_an_agent_calls_its_tool(caller: GatedLLM) -> None:
    called = []

    def note(text: str) -> str:
        """Note a text."""
        called.append(text)
        return "noted"

    class Note(BaseModel):
        text: str = Field(max_length=8)  # a random model ends no string by itself

    tool = FunctionTool.from_defaults(note, fn_schema=Note)
    agent = FunctionAgent(llm=caller, tools=[tool], initial_tool_choice="note")
    await agent.run("hi")

    assert len(called) == 1 and called[0]


# --- cancellation, counted in forwards


@pytest.mark.parametrize("call", ["achat", "acomplete"])
async def test_cancelling_stops_within_a_token(llm: GatedLLM, count_forwards: Any, call: str) -> None:
    forwards = count_forwards(llm)
    prompt: Any = [ChatMessage("hi")] if call == "achat" else "hi"
    task = asyncio.create_task(getattr(llm, call)(prompt, max_tokens=LONG, head=None))
    await forwards.reached(10)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert await forwards.settled() <= 2
    assert forwards.count < LONG / 2


@pytest.fixture(params=["no handler", "a handler that keeps exceptions"])
def handled(request: pytest.FixtureRequest, llm: GatedLLM) -> GatedLLM:
    """Closing a generator is an exception in it; kept, it keeps the generators inside the one that was closed."""
    if request.param != "no handler":
        llm.callback_manager = CallbackManager([LlamaDebugHandler(print_trace_on_end=False)])
    return llm


@pytest.mark.parametrize("call", ["stream_chat", "stream_complete"])
async def test_leaving_a_stream_stops_within_a_token(handled: GatedLLM, count_forwards: Any, call: str) -> None:
    forwards = count_forwards(handled)
    prompt: Any = [ChatMessage("hi")] if call == "stream_chat" else "hi"

    for _ in getattr(handled, call)(prompt, max_tokens=LONG, head=None):
        break

    assert await forwards.settled() <= 2
    assert forwards.count < LONG / 2


@pytest.mark.parametrize("call", ["astream_chat", "astream_complete"])
async def test_leaving_an_async_stream_stops_before_the_event_loop_gets_its_turn(
    handled: GatedLLM, count_forwards: Any, call: str
) -> None:
    forwards = count_forwards(handled)
    prompt: Any = [ChatMessage("hi")] if call == "astream_chat" else "hi"

    async for _ in await getattr(handled, call)(prompt, max_tokens=LONG, head=None):
        break
    left_at = forwards.count
    time.sleep(0.2)  # noqa: ASYNC251  # the loop is busy, as with a reader's own work

    assert forwards.count - left_at <= 2
    assert await forwards.settled() <= 2


async def test_leaving_a_stream_of_objects_stops_within_a_token(handled: GatedLLM, count_forwards: Any) -> None:
    class Story(BaseModel):
        text: str

    forwards = count_forwards(handled)
    settings = {"llm_kwargs": {"max_tokens": LONG, "head": None}}

    for _ in handled.stream_structured_predict(Story, PromptTemplate("hi"), **settings):
        break
    assert await forwards.settled() <= 2
    async for _ in await handled.astream_structured_predict(Story, PromptTemplate("hi"), **settings):
        break
    await forwards.settled()

    assert forwards.count < LONG / 2


async def test_an_answer_is_waited_for_though_its_stream_is_not_kept(llm: GatedLLM) -> None:
    first = await anext(await llm.astream_chat([ChatMessage("hi")]))

    assert first.delta


def test_a_stream_may_be_made_where_no_event_loop_runs(llm: GatedLLM) -> None:
    stream = llm.engine.astream("hi", max_new_tokens=3)

    async def last() -> Any:
        return [update async for update in stream][-1]

    assert len(asyncio.run(last()).generation.token_ids) == 3
