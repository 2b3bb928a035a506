"""Agents, chat engines and query engines of LlamaIndex on a model whose replies are written in a script."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import llama_index.core
import pytest
from llama_index.core import Document, Settings, SummaryIndex
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent, ToolCall, ToolCallResult
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel, Field

from mara_integrations import MARALLM
from mara_integrations.engine.decoder import Decoder
from mara_integrations.frameworks.llama_index import GatedLLM
from mara_integrations.runtime import MARAEngine, worker_for
from mara_integrations.testing import ScriptedBackend, random_head, tiny_model, tiny_tokenizer

# LlamaIndex' workflows look at all attributes of an agent, the deprecated ones too
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*aiosqlite:ResourceWarning"),  # of the memory of an agent
]

WINDOW = 16_384
CallTool = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'


@pytest.fixture(autouse=True)
def untouched_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(llama_index.core, "global_tokenizer", None)
    for name in ("_llm", "_node_parser", "_transformations"):  # a splitter counts as the model of its first user does
        monkeypatch.setattr(Settings, name, None)
    yield
    gc.collect()  # what is to be said about a forgotten memory is said here, not in another test


def scripted(reply: Callable[[str], str], **settings: Any) -> GatedLLM:
    """An LLM that answers a prompt with `reply(prompt)`, through parser, grammar and decoder as any model does."""
    tokenizer = tiny_tokenizer()
    llm = GatedLLM((tiny_model(max_position_embeddings=WINDOW), tokenizer), max_tokens=600, **settings)

    def script(token_ids: Any) -> list[float]:
        prompt, _, written = tokenizer.decode(token_ids).rpartition("[assistant] ")
        wanted = [*tokenizer(reply(prompt))["input_ids"], 0]
        done = tokenizer(written)["input_ids"]
        assert wanted[: len(done)] == done, f"the script was left: {written!r}"
        return [50.0 if token_id == wanted[len(done)] else 0.0 for token_id in range(256)]

    worker_for(llm.engine.model).decoder = Decoder(ScriptedBackend(script, 256))
    return llm


def lookup(city: str) -> str:
    """Find how many people live in a city."""
    return {"Rome": "3", "Oslo": "1"}[city]


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def two_tools(prompt: str) -> str:
    match prompt.count("<tool_response>"):
        case 0:
            return "I look it up." + CallTool.format("lookup", '{"city": "Rome"}')
        case 1:
            return CallTool.format("add", '{"a": 3, "b": 39}')
    assert '{"name": "lookup", "content": "3"}' in prompt  # the framework sent the id of its call alone
    assert '{"name": "add", "content": "42"}' in prompt
    return "It is 42."


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_function_agent_finishes_a_task_of_two_tools(streaming: bool) -> None:
    agent = FunctionAgent(llm=scripted(two_tools), tools=[lookup, add], streaming=streaming)

    handler = agent.run("People in Rome and 39 more?")
    called = [(e.tool_name, e.tool_kwargs) async for e in handler.stream_events() if type(e) is ToolCall]

    assert str(await handler) == "It is 42."
    assert called == [("lookup", {"city": "Rome"}), ("add", {"a": 3, "b": 39})]


async def test_an_agents_tokens_are_streamed() -> None:
    handler = FunctionAgent(llm=scripted(two_tools), tools=[lookup, add]).run("People in Rome and 39 more?")

    deltas = [event.delta async for event in handler.stream_events() if hasattr(event, "delta")]

    assert "".join(deltas) == "I look it up.It is 42."
    assert len([delta for delta in deltas if delta]) > 10


async def test_parallel_calls_are_all_made() -> None:
    def both(prompt: str) -> str:
        calls = [CallTool.format("lookup", f'{{"city": "{city}"}}') for city in ("Rome", "Oslo")]
        return "3 and 1." if "<tool_response>" in prompt else "\n".join(calls)

    agent = FunctionAgent(llm=scripted(both), tools=[lookup], allow_parallel_tool_calls=True)
    handler = agent.run("Rome and Oslo?")
    results = [str(e.tool_output) async for e in handler.stream_events() if isinstance(e, ToolCallResult)]

    assert sorted(results) == ["1", "3"]
    assert str(await handler) == "3 and 1."


class First(BaseModel):
    count: Literal[1, 2]  # a model that writes nonsense comes to its end


class Second(BaseModel):
    word: Literal["x", "y"]


async def test_calls_are_forced_on_a_model_that_would_write_nonsense() -> None:
    class Guided(GatedLLM):
        """Says at each turn which tool it must call; after both, that it must answer."""

        def _prepare_chat_with_tools(self, tools: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            done = sum(message.role == "tool" for message in kwargs["chat_history"])
            choice = tools[done].metadata.name if done < 2 else "none"
            return super()._prepare_chat_with_tools(tools, *args, **{**kwargs, "tool_choice": choice})

    def first(count: int) -> int:
        """First tool."""
        return count

    def second(word: str) -> str:
        """Second tool."""
        return word

    model = (tiny_model(max_position_embeddings=WINDOW), tiny_tokenizer())
    llm = Guided(model, head=random_head(32), max_tokens=100)
    tools = [FunctionTool.from_defaults(first, fn_schema=First), FunctionTool.from_defaults(second, fn_schema=Second)]
    handler = FunctionAgent(llm=llm, tools=tools).run("hi")
    called = [(e.tool_name, list(e.tool_kwargs)) async for e in handler.stream_events() if type(e) is ToolCall]

    assert (await handler).response.content
    assert called == [("first", ["count"]), ("second", ["word"])]


async def test_a_workflow_hands_over_to_its_second_agent() -> None:
    def reply(prompt: str) -> str:
        if "I am the reader." in prompt:
            return CallTool.format("handoff", '{"to_agent": "writer", "reason": "it has read"}')
        return "It is 3." if '"content": "3"' in prompt else CallTool.format("lookup", '{"city": "Rome"}')

    llm = scripted(reply)
    prompt = {"llm": llm, "system_prompt": "I am the reader."}
    reader = FunctionAgent(name="reader", description="Reads", tools=[add], can_handoff_to=["writer"], **prompt)
    prompt["system_prompt"] = "I am the writer."
    writer = FunctionAgent(name="writer", description="Writes", tools=[lookup], can_handoff_to=["reader"], **prompt)

    output = await AgentWorkflow(agents=[reader, writer], root_agent="reader").run("People in Rome?")

    assert output.current_agent_name == "writer"
    assert output.response.content == "It is 3."


async def test_a_react_agent_thinks_acts_and_answers() -> None:
    def reply(prompt: str) -> str:
        if "Observation: 3" in prompt:
            return "Thought: I can answer without using any more tools.\nAnswer: It is 3."
        return 'Thought: I need a tool.\nAction: lookup\nAction Input: {"city": "Rome"}'

    assert str(await ReActAgent(llm=scripted(reply), tools=[lookup]).run("People in Rome?")) == "It is 3."


# --- chat engines and query engines

FACT = "Support answers by email."


def index() -> SummaryIndex:
    return SummaryIndex.from_documents([Document(text=FACT)])


def about_support(prompt: str) -> str:
    if "standalone question" in prompt or "standalone message" in prompt:
        return "How does support answer?"
    return "By email." if FACT in prompt else "I can't tell."


@pytest.mark.usefixtures("event_loop")
@pytest.mark.parametrize("mode", ["simple", "context", "condense_question", "condense_plus_context"])
def test_chat_engines_talk(mode: str) -> None:
    engine = index().as_chat_engine(chat_mode=mode, llm=scripted(about_support))
    expected = "I can't tell." if mode == "simple" else "By email."

    assert str(engine.chat("How?")) == expected
    assert "".join(engine.stream_chat("And then?").response_gen) == expected
    assert [message.role.value for message in engine.chat_history] == ["user", "assistant"] * 2


@pytest.mark.parametrize("mode", ["simple", "context", "condense_question", "condense_plus_context"])
async def test_chat_engines_talk_without_blocking(mode: str) -> None:
    engine = index().as_chat_engine(chat_mode=mode, llm=scripted(about_support))
    expected = "I can't tell." if mode == "simple" else "By email."

    assert str(await engine.achat("How?")) == expected
    streamed = await engine.astream_chat("And then?")
    assert "".join([piece async for piece in streamed.async_response_gen()]) == expected


@pytest.mark.usefixtures("event_loop")
def test_query_engines_answer() -> None:
    llm = scripted(about_support)

    assert str(index().as_query_engine(llm=llm).query("How?")) == "By email."
    assert "".join(index().as_query_engine(llm=llm, streaming=True).query("How?").response_gen) == "By email."
    tree = index().as_query_engine(llm=llm, response_mode="tree_summarize")
    assert str(tree.query("How?")) == "By email."


async def test_query_engines_answer_without_blocking() -> None:
    llm = scripted(about_support)

    assert str(await index().as_query_engine(llm=llm).aquery("How?")) == "By email."
    streamed = await index().as_query_engine(llm=llm, streaming=True).aquery("How?")
    assert "".join([piece async for piece in streamed.async_response_gen()]) == "By email."


class Channel(BaseModel):
    """How support answers."""

    medium: str = Field(max_length=20)
    is_quick: bool


@pytest.mark.usefixtures("event_loop")
def test_a_query_engine_answers_with_an_object() -> None:
    llm = scripted(lambda prompt: CallTool.format("Channel", '{"medium": "email", "is_quick": true}'))

    answer = index().as_query_engine(llm=llm, output_cls=Channel).query("How?").response

    assert answer == Channel(medium="email", is_quick=True)


async def test_a_query_engine_answers_with_an_object_without_blocking() -> None:
    llm = scripted(lambda prompt: CallTool.format("Channel", '{"medium": "email", "is_quick": true}'))

    answer = (await index().as_query_engine(llm=llm, output_cls=Channel).aquery("How?")).response

    assert answer == Channel(medium="email", is_quick=True)


# --- prompts are packed into the window, counted as the model counts


LONG_TEXT = " ".join(f"Fact {number}: the answer to everything is {number}." for number in range(125))  # 5,500 tokens
SMALL_WINDOW = 2048
# That window less the reply; LlamaIndex does not know what announces a reply in a template, twelve tokens here.
ROOM = SMALL_WINDOW - 20 + len("[assistant] ")


@pytest.fixture
def prompt_lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    lengths: list[int] = []
    request = MARAEngine.request

    def seen(self: MARAEngine, *args: Any, **kwargs: Any) -> Any:
        found = request(self, *args, **kwargs)
        lengths.append(len(found.prompt_ids))
        return found

    monkeypatch.setattr(MARAEngine, "request", seen)
    return lengths


def windowed() -> GatedLLM:
    return GatedLLM((tiny_model(max_position_embeddings=SMALL_WINDOW), tiny_tokenizer()), max_tokens=20)


@pytest.mark.usefixtures("event_loop")
@pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize", "simple_summarize"])
def test_long_documents_are_packed_to_fit(mode: str, prompt_lengths: list[int]) -> None:
    llm = windowed()
    # LlamaIndex counts with its own default by then
    long_index = SummaryIndex.from_documents([Document(text=LONG_TEXT), Document(text=LONG_TEXT)])

    assert str(long_index.as_query_engine(llm=llm, response_mode=mode).query("How?"))

    assert ROOM - 400 < max(prompt_lengths) <= ROOM  # none is too long, and the window is used
    assert len(prompt_lengths) > 5 or mode == "simple_summarize"


async def test_long_documents_are_packed_to_fit_without_blocking(prompt_lengths: list[int]) -> None:
    long_index = SummaryIndex.from_documents([Document(text=LONG_TEXT)])

    assert str(await long_index.as_query_engine(llm=windowed()).aquery("How?"))

    assert ROOM - 400 < max(prompt_lengths) <= ROOM


def test_a_tokenizer_that_the_user_chose_stays() -> None:
    Settings.tokenizer = chosen = list

    assert windowed().metadata.context_window == SMALL_WINDOW
    assert Settings.tokenizer is chosen


def test_a_new_tokenizer_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    llm = windowed()
    with caplog.at_level("INFO", "mara_integrations"):
        assert llm.metadata and llm.metadata

    assert [record.message for record in caplog.records].count(
        "LlamaIndex counts tokens by this model's tokenizer now; Settings.tokenizer = ... chooses another"
    ) == 1


def test_the_model_that_is_asked_counts() -> None:
    assert len(Settings.tokenizer("hello")) == 1  # GPT-3.5's
    assert windowed().metadata and len(Settings.tokenizer("hello")) == 5
    other = tiny_tokenizer()
    other.add_tokens(["hello"])
    assert GatedLLM((tiny_model(), other)).metadata and len(Settings.tokenizer("hello")) == 1


def test_metadata_loads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(max_position_embeddings=333).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    llm = GatedLLM(str(tmp_path), device="cpu")
    with monkeypatch.context() as context:
        context.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)

        assert llm.metadata.context_window == 333
        assert len(Settings.tokenizer("hello")) == 5

    assert not llm.engine.is_loaded
    llm.load()
    assert llm.metadata.context_window == 333


# --- the small real model, held by a grammar


@pytest.mark.slow
@pytest.mark.usefixtures("embedded")
async def test_a_real_model_streams_objects() -> None:
    class City(BaseModel):
        name: str = Field(max_length=12)
        is_capital: bool

    template = llama_index.core.PromptTemplate("Which city is the capital of {config}?")
    llm = MARALLM("smollm2", max_tokens=40)

    *partial, last = llm.stream_structured_predict(City, template, config="France")
    objects = [each async for each in await llm.astream_structured_predict(City, template, config="France")]

    assert isinstance(last, City) and last.name
    assert objects[-1] == last
    assert partial and all(getattr(each, "name", None) is None or last.name.startswith(each.name) for each in partial)


@pytest.mark.slow
@pytest.mark.usefixtures("embedded")
def test_a_real_model_calls_a_tool_with_the_right_arguments() -> None:
    llm = MARALLM("smollm2", max_tokens=60)
    tool = llama_index.core.tools.FunctionTool.from_defaults(add)

    answer = llm.predict_and_call([tool], "Add 2 and 3.", tool_required=True)

    assert answer.sources[0].tool_name == "add"
    assert set(answer.sources[0].raw_input["kwargs"]) == {"a", "b"}
    assert llm.chat([ChatMessage("hi")], max_tokens=2).message.content


def test_thoughts_are_a_block_of_their_own() -> None:
    llm = scripted(lambda prompt: "<think>\nA cat?\n</think>\n\nYes.")
    message = llm.chat([ChatMessage("Is it?")]).message
    assert [block.block_type for block in message.blocks] == ["thinking", "text"]
    assert message.content == "Yes." and message.blocks[0].content == "A cat?"


async def test_thoughts_are_streamed_apart() -> None:
    llm = scripted(lambda prompt: "<think>A cat?</think>Yes.")
    responses = [response async for response in await llm.astream_chat([ChatMessage("Is it?")])]
    assert "".join(r.additional_kwargs.get("thinking_delta", "") for r in responses) == "A cat?"
    assert "".join(r.delta or "" for r in responses) == "Yes."


async def test_a_completion_is_the_answer_without_its_thoughts() -> None:
    llm = scripted(lambda prompt: "<think>\nA cat?\n</think>\n\nYes.")

    for whole in (llm.complete("Is it?"), await llm.acomplete("Is it?"), [*llm.stream_complete("Is it?")][-1]):
        assert whole.text == "Yes." and whole.additional_kwargs == {"thinking": "A cat?"}
    assert "".join(part.delta or "" for part in llm.stream_complete("Is it?")) == "Yes."
