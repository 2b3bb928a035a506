"""`MARALLM` and `ChatMARA` on a server: what they answer in this process, with one argument changed."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("openai", reason="needs the client extra")
pytest.importorskip("uvicorn", reason="needs the serve extra")

from langchain_core.language_models import BaseChatModel
from langchain_core.load import dumpd
from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel
from serving import serving
from vllm_like import THOUGHTS, VLLMLike

from mara_integrations import MARALLM, ChatMARA
from mara_integrations.errors import ConfigError, CutReplyError, HeadError, ServerError
from mara_integrations.runtime import MARAEngine
from mara_integrations.server import create_app
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer


class Answer(BaseModel):
    """An answer."""

    is_true: bool


def clock(zone: bool) -> str:
    """Tell the time."""
    return f"noon {zone}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("heads")
    heads = {name: str(random_head(32, "q", seed=seed).save_pretrained(folder / name)) for seed, name in HEADS}
    model = (tiny_model(), tiny_tokenizer())
    with MARAEngine(model) as engine, serving(create_app(engine.load(), heads, name="tiny", api_key="key")) as port:
        yield SimpleNamespace(model=model, heads=heads, url=f"http://127.0.0.1:{port}", engine=engine)


HEADS = enumerate(("brand", "calm"))


@pytest.fixture(params=[MARALLM, ChatMARA])
def pair(request: Any, server: Any) -> Iterator[tuple[Any, Any]]:
    """The same model with the same head, here and in the server."""
    here = request.param(server.model, head=server.heads["brand"], max_tokens=12)
    with request.param("tiny", head="brand", max_tokens=12, base_url=server.url, api_key="key") as there:
        yield here, there


@pytest.fixture
def llm(server: Any) -> Iterator[MARALLM]:
    with MARALLM("tiny", head="brand", max_tokens=12, base_url=server.url, api_key="key") as llm:
        yield llm


@pytest.fixture
def here(server: Any) -> MARALLM:
    return MARALLM(server.model, head=server.heads["brand"], max_tokens=12)


# --- LangChain


def test_one_argument_more_gives_the_same_answers(pair: tuple[Any, Any]) -> None:
    here, there = pair
    expected, answer = here.invoke("hi"), there.invoke("hi")

    assert answer.content == expected.content and answer.usage_metadata == expected.usage_metadata
    assert answer.response_metadata["finish_reason"] == expected.response_metadata["finish_reason"] == "length"
    assert answer.response_metadata["gate"]["accepted"] == expected.response_metadata["gate"]["accepted"]
    assert there.invoke("hi", head=None).content == here.invoke("hi", head=None).content != expected.content
    assert [one.content for one in there.batch(["a", "b", "c"])] == [one.content for one in here.batch(["a", "b", "c"])]


def test_a_stream_adds_up_to_the_answer(pair: tuple[Any, Any]) -> None:
    here, there = pair
    whole: Any = None
    chunks = list(there.stream("hi"))
    for chunk in chunks:
        assert isinstance(chunk, AIMessageChunk)
        whole = chunk if whole is None else whole + chunk

    assert len(chunks) > 3 and whole.content == here.invoke("hi").content
    assert whole.usage_metadata == here.invoke("hi").usage_metadata
    assert whole.response_metadata["gate"]["rejected"] > 0


async def test_async_calls_answer_alike(pair: tuple[Any, Any]) -> None:
    here, there = pair
    expected = here.invoke("hi").content

    assert (await there.ainvoke("hi")).content == expected
    assert "".join([chunk.text async for chunk in there.astream("hi")]) == expected
    assert [one.content for one in await there.abatch(["hi"] * 3)] == [expected] * 3


def test_log_probabilities_are_told_as_here(pair: tuple[Any, Any]) -> None:
    expected, answer = (one.invoke("hi", top_logprobs=2).response_metadata["logprobs"] for one in pair)

    assert [token["token"] for token in answer["content"]] == [token["token"] for token in expected["content"]]
    for token, other in zip(answer["content"], expected["content"], strict=True):
        assert token["logprob"] == pytest.approx(other["logprob"]) and token["outcome"] == other["outcome"]
        assert [one["token"] for one in token["top_logprobs"]] == [one["token"] for one in other["top_logprobs"]]


def test_tools_are_called_as_here(pair: tuple[Any, Any]) -> None:
    pytest.importorskip("xgrammar", reason="needs the tools extra")
    bound = [one.bind_tools([clock], tool_choice="any").bind(max_tokens=120) for one in pair]
    (expected,), (call,) = (one.invoke("hi").tool_calls for one in bound)

    assert call["name"] == "clock" and call["args"] == expected["args"] != {}
    whole: Any = None
    for chunk in bound[1].stream("hi"):
        whole = chunk if whole is None else whole + chunk
    assert [(one["name"], one["args"]) for one in whole.tool_calls] == [("clock", call["args"])]


def test_a_call_that_is_cut_is_invalid(pair: tuple[Any, Any]) -> None:
    pytest.importorskip("xgrammar", reason="needs the tools extra")
    for max_tokens in (3, 30):  # before anything of it was written, and within
        answers = [one.bind_tools([clock], tool_choice="any").invoke("hi", max_tokens=max_tokens) for one in pair]
        for answer in answers:
            assert not answer.tool_calls and len(answer.invalid_tool_calls) == 1 and not answer.content
        assert answers[0].invalid_tool_calls[0]["error"] == answers[1].invalid_tool_calls[0]["error"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_whole_or_an_error(pair: tuple[Any, Any], method: Any) -> None:
    pytest.importorskip("xgrammar", reason="needs the tools extra")
    expected, answer = (one.with_structured_output(Answer, method=method, max_tokens=120).invoke("hi") for one in pair)

    assert isinstance(answer, Answer) and answer == expected
    with pytest.raises(CutReplyError):
        pair[1].with_structured_output(Answer, method=method, max_tokens=5).invoke("hi")


def test_thoughts_are_apart() -> None:
    vllm = VLLMLike()
    vllm.thinks = True
    with serving(vllm.app) as port, ChatMARA("m", base_url=f"http://127.0.0.1:{port}") as llm:
        assert llm.invoke("hi").additional_kwargs["reasoning_content"] == THOUGHTS.replace(" ", "")
        with MARALLM("m", base_url=llm.base_url) as both:
            *_, last = both.stream_chat([ChatMessage("hi")])
            assert last.message.blocks[0].content == THOUGHTS.replace(" ", "")


# --- LlamaIndex


def test_llama_index_gets_the_same_answers(llm: MARALLM, here: MARALLM) -> None:
    expected = here.complete("hi")
    messages = [ChatMessage("hi")]

    assert llm.complete("hi").text == llm.chat(messages).message.content == expected.text
    assert [one.text for one in llm.stream_complete("hi")][-1] == expected.text
    assert llm.complete("once", formatted=True).text == here.complete("once", formatted=True).text
    *_, last = llm.stream_chat(messages)
    assert last.raw["usage"] == expected.raw["usage"] and last.raw["model_name"] == "tiny"


async def test_llama_index_gets_them_async(llm: MARALLM, here: MARALLM) -> None:
    expected = here.complete("hi").text

    assert (await llm.acomplete("hi")).text == (await llm.achat([ChatMessage("hi")])).message.content == expected
    assert [one.text async for one in await llm.astream_complete("hi")][-1] == expected


def test_llama_index_calls_tools_and_reads_objects(llm: MARALLM, here: MARALLM) -> None:
    pytest.importorskip("xgrammar", reason="needs the tools extra")
    tool = FunctionTool.from_defaults(clock)
    called = [one.predict_and_call([tool], "hi", tool_required=True, max_tokens=120).response for one in (llm, here)]
    assert called[0] == called[1] and called[0].startswith("noon")
    prompt = PromptTemplate("Is it {what}?")
    llm.max_tokens = here.max_tokens = 120
    objects = [one.structured_predict(Answer, prompt, what="so") for one in (llm, here)]
    assert objects[0] == objects[1]
    streamed = [list(one.stream_structured_predict(Answer, prompt, what="so")) for one in (llm, here)]
    assert isinstance(streamed[0][-1], Answer) and streamed[0][-1] == streamed[1][-1]


def test_prompts_are_packed_by_the_servers_window(llm: MARALLM, server: Any) -> None:
    assert llm.metadata.context_window == server.engine.model.context_window
    assert llm.metadata.model_name == "tiny"


# --- settings


def test_a_changed_setting_holds_from_the_next_call_on(llm: MARALLM, server: Any, here: MARALLM) -> None:
    before = llm.invoke("hi").content

    llm.head = "calm"

    assert llm.invoke("hi").content == here.invoke("hi", head=server.heads["calm"]).content != before
    with pytest.raises(HeadError, match="'other' is not served"):
        llm.complete("hi", head="other")
    llm.model, llm.head, llm.base_url = server.model, server.heads["brand"], None
    assert llm.invoke("hi").content == before and llm.complete("hi").raw["token_ids"]


@pytest.mark.parametrize("kind", [MARALLM, ChatMARA])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda"}, "device='cuda' says how a model is loaded"),
        ({"quantization": "int8"}, "quantization='int8'"),
        ({"trace": True}, "a server sends no traces"),
        ({"head": "heads/brand-voice"}, "--head brand-voice=heads/brand-voice"),
        ({"engine": "llama.cpp"}, "engine='llama.cpp' runs the model in this process"),
        ({"base_url": None, "engine": "server"}, "no address is given"),
        ({"base_url": "127.0.0.1:8000"}, "is not an address"),
        ({"model": (1, 2)}, "can't be sent to a server"),
        ({"timeout": 0}, "timeout=0"),
        ({"max_retries": -1}, "max_retries=-1"),
    ],
    ids=str,
)
def test_what_a_server_can_not_do_is_refused_at_once(
    kind: Any, settings: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ConfigError, match=message):
        kind(**{"model": "tiny", "base_url": "http://127.0.0.1:9", **settings})


def test_the_address_may_come_from_the_environment(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    monkeypatch.setenv("MARA_API_KEY", "key")
    with ChatMARA("tiny", engine="server", max_tokens=3) as llm:
        assert llm.invoke("hi").response_metadata["model_name"] == "tiny"


def test_nothing_is_asked_before_the_first_use() -> None:
    nowhere = ChatMARA("tiny", head="brand", base_url="http://127.0.0.1:9", max_retries=0)

    assert nowhere.model_name == "tiny" and "brand" in repr(nowhere)
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:9"):
        nowhere.load()


def test_keys_are_shown_nowhere(llm: MARALLM, server: Any) -> None:
    secret = ChatMARA("tiny", base_url=server.url, api_key="sesame")
    for llm_with_key in (secret, MARALLM("tiny", base_url=server.url, api_key="sesame")):
        assert "sesame" not in f"{llm_with_key!r}{llm_with_key}{llm_with_key.model_dump_json()}"
    assert "sesame" not in str(dumpd(secret)) + str(secret._identifying_params)
    again = pickle.loads(pickle.dumps(llm))
    assert again.invoke("hi").content == llm.invoke("hi").content
    again.close()


def test_cached_answers_are_told_apart_by_server_and_head() -> None:
    def key(**settings: Any) -> str:
        return ChatMARA(**{"model": "tiny", "base_url": "http://a", **settings})._get_llm_string()

    assert len({key(), key(base_url="http://b"), key(head="brand"), key(head="calm")}) == 4


def test_tokens_are_not_counted_here(llm: MARALLM) -> None:
    for count in (llm.get_token_ids, lambda text: llm.get_num_tokens_from_messages([HumanMessage(text)])):
        with pytest.raises(ConfigError, match="its tokenizer are not in this process"):
            count("hi")
    assert llm.as_langchain().load().profile["max_input_tokens"] == 512


# --- LangChain's own suites


@pytest.fixture(scope="module")
def vllm() -> Iterator[str]:
    with serving(VLLMLike().app) as port:
        yield f"http://127.0.0.1:{port}"


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatMARA

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "m", "head": "brand", "base_url": "http://127.0.0.1:9"}


class TestIntegrationOnVLLM(ChatModelIntegrationTests):
    """On a server that answers as vLLM does, whose model is never wrong."""

    url: str

    @pytest.fixture(autouse=True)
    def served(self, vllm: str) -> None:
        self.url = vllm

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatMARA

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "m", "head": "brand", "base_url": self.url}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return False  # which model runs is a setting of the object
