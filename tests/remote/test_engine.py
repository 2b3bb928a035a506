"""`ServerEngine` on `mara-tools serve`: the replies of the engine in this process, and how requests end."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading

import pytest
from waiting import eventually

from mara_integrations.errors import (
    ConfigError,
    ContextLengthError,
    EngineClosedError,
    HeadError,
    MissingExtraError,
    ModelError,
    ServerError,
)
from mara_integrations.heads.source import head_weights
from mara_integrations.messages import Conversation, Message, Tool, ToolCall
from mara_integrations.remote import connection
from mara_integrations.remote.connection import Address
from mara_integrations.remote.engine import ServerEngine
from mara_integrations.replies.forms import ReplyForm
from mara_integrations.testing import random_head

LONG = 400  # tokens
CHAT = [Message("system", "Be brief."), Message("user", "hi")]


# --- the same replies


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"head": "brand"},
        {"head": "brand", "strength": 0.3},
        {"head": "brand", "strength": 0},
        {"head": {"brand": 0.5, "calm": 2.0}},
        {"head": ["brand", "brand"]},
        {"temperature": 1.3, "seed": 7},
        {"head": "brand", "temperature": 1.3, "seed": 7, "top_k": 9, "top_p": 0.8, "min_candidates": 2},
        {"head": "brand", "selection": "sample", "seed": 3},
        {"max_new_tokens": 3},
        {"never": ["hi"]},
        {"system_prompt": "Be brief."},
        {"head": "calm"},  # brings a system prompt
        {"head": "calm", "system_prompt": ""},
    ],
    ids=str,
)
def test_a_reply_is_the_one_of_this_process(engine, local, heads, settings):
    placed = {heads[name]: weight for name, weight in head_weights(settings.get("head")).items()}
    expected = local.generate("hi", **{"max_new_tokens": 12, **settings, "head": placed or None})

    reply = engine.generate("hi", **settings)

    assert reply.text == expected.text and reply.finish_reason == expected.finish_reason
    assert (reply.prompt_tokens, reply.completion_tokens) == (expected.prompt_tokens, expected.completion_tokens)
    assert (reply.stats.accepted, reply.stats.rejected) == (expected.stats.accepted, expected.stats.rejected)


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        (CHAT, {}),
        (Conversation(tuple(CHAT)), {}),
        ("once upon", {"raw": True}),
        ([5, 6, 7], {}),
        (
            [
                Message("user", "what time is it?"),
                Message("assistant", "", (ToolCall("c1", "clock", {"zone": "utc"}),)),
                Message("tool", "noon", tool_call_id="c1"),
            ],
            {},
        ),
    ],
    ids=["messages", "conversation", "raw", "ids", "calls"],
)
def test_all_kinds_of_prompts_are_sent(engine, local, prompt, settings):
    expected = local.generate(prompt, max_new_tokens=12, **settings)
    reply = engine.generate(prompt, **settings)

    assert reply.text == expected.text and reply.prompt_tokens == expected.prompt_tokens


def test_raw_text_gets_the_log_probabilities_of_this_process(engine, local):
    def told(one, **settings):
        reply = one.generate("once", raw=True, **settings, **one.log_prob_settings(2))
        return one.report(reply, has_trace=False, top_logprobs=2)["logprobs"]["content"]

    for token, other in zip(told(engine), told(local, max_new_tokens=12), strict=True):
        assert token["token"] == other["token"] and token["bytes"] in (other["bytes"], None)
        assert token["logprob"] == pytest.approx(other["logprob"])
        alternatives = ({one["token"]: one["logprob"] for one in each["top_logprobs"]} for each in (token, other))
        assert next(alternatives) == pytest.approx(next(alternatives))
    assert "logprobs" not in engine.report(engine.generate("once", raw=True))


def test_a_stop_string_ends_a_reply(engine):
    text = engine.generate("hi").text
    stopped = engine.generate("hi", stop=text[4:6])

    assert stopped.text == text[: text.index(text[4:6])] and stopped.finish_reason == "stop"


def test_a_stream_adds_up_to_the_reply(engine):
    *updates, last = engine.stream("hi")

    assert len(updates) > 2 and all(update.generation is None for update in updates)
    assert "".join(update.text for update in updates) == last.generation.text == engine.generate("hi").text


async def test_async_replies_are_the_same(engine):
    whole = (await engine.agenerate("hi")).text
    text = "".join([update.text async for update in engine.astream("hi")])

    assert whole == text == engine.generate("hi").text


def test_a_batch_is_what_its_prompts_get_alone(engine):
    prompts = [f"number {i}" for i in range(12)]

    assert [one.text for one in engine.generate_batch(prompts)] == [engine.generate(one).text for one in prompts]


def test_one_engine_serves_every_thread_and_every_event_loop(engine):
    expected = engine.generate("hi").text
    heard: list[str] = []
    threads = [threading.Thread(target=lambda: heard.append(engine.generate("hi").text)) for _ in range(4)]
    for thread in threads:
        thread.start()
    heard += [asyncio.run(engine.agenerate("hi")).text for _ in range(3)]
    for thread in threads:
        thread.join()

    assert heard == [expected] * 7


def test_other_settings_share_the_connection(engine):
    text = engine.generate("hi", head="brand").text
    twin = engine.with_settings(head="brand")

    assert twin.generate("hi").text == text != engine.generate("hi").text
    twin.close()
    with pytest.raises(EngineClosedError):
        engine.generate("hi")


def test_without_a_name_the_server_s_own_model_answers(make, engine, local):
    nameless = make(model=None, max_new_tokens=12)

    assert nameless.generate("hi").text == engine.generate("hi").text
    assert nameless.load().served.name == "tiny" and nameless.outline.context_window == local.model.context_window


# --- ends


def running(server):
    return server.app.state.admission.num_running


@pytest.mark.parametrize("way", ["close", "drop", "break"])
def test_a_stream_that_is_left_ends_at_the_server(engine, server, way):
    stream = engine.stream("hi", max_new_tokens=LONG)
    next(stream)
    assert running(server) == 1

    if way == "close":
        stream.close()
    elif way == "break":
        for _ in stream:
            break
    del stream
    gc.collect()

    eventually(lambda: running(server) == 0)
    assert engine.generate("hi").text


async def test_cancelled_tasks_end_at_the_server(engine, server):
    tasks = [asyncio.ensure_future(engine.agenerate("hi", max_new_tokens=LONG)) for _ in range(3)]
    await asyncio.to_thread(eventually, lambda: running(server) == 3)
    for task in tasks:
        task.cancel()

    assert all(isinstance(one, asyncio.CancelledError) for one in await asyncio.gather(*tasks, return_exceptions=True))
    await asyncio.to_thread(eventually, lambda: running(server) == 0)


def test_closing_an_engine_ends_its_replies(engine, server):
    stream = engine.stream("hi", max_new_tokens=LONG)
    next(stream)
    engine.close()

    with pytest.raises(EngineClosedError, match="before the reply was finished"):
        list(stream)
    eventually(lambda: running(server) == 0)
    assert not engine.status.is_healthy
    for ask in (lambda: engine.generate("hi"), engine.load):
        with pytest.raises(EngineClosedError, match="is closed"):
            ask()


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"head": "other"}, HeadError, r"head 'other' is not served \(hint: heads are brand, calm\)"),
        ({"model": "gpt"}, ModelError, r"model 'gpt' is not served \(hint: models are tiny, tiny:brand"),
        ({"api_key": "wrong"}, ServerError, r"status 401: .* \(hint: give api_key=, or set MARA_API_KEY\)"),
        ({"url": "http://127.0.0.1:9"}, ServerError, "connection to http://127.0.0.1:9/v1 failed"),
        ({"timeout": 1e-5}, ServerError, "did not answer in time.*timeout="),
    ],
    ids=["head", "model", "key", "address", "timeout"],
)
def test_what_a_server_refuses_is_our_error(make, settings, error, message):
    engine = make(**settings, max_new_tokens=4)
    with pytest.raises(error, match=message):
        engine.generate("hi")


def test_a_wrong_path_is_named(make, server):
    with pytest.raises(ServerError, match=r"status 404.*base_url is the part before"):
        make(url=f"{server.url}/v2").generate("hi")


def test_a_prompt_that_is_too_long_is_a_context_length_error(engine):
    with pytest.raises(ContextLengthError, match="512 tokens"):
        engine.generate("x" * 600)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trace": True}, "a server sends no traces"),
        ({"head": random_head(32)}, "head NAME=FOLDER"),
        ({"head": "heads/brand"}, r"knows heads by name .* --head brand=heads/brand`, and give head='brand'"),
        ({"head": ["brand", "org/brand"]}, "'org/brand' is a folder or a Hub id"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_kk": 3}, "did you mean top_k"),
        ({"raw": True, "form": ReplyForm(json_schema={"type": "object"})}, "need a conversation"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_no_server_can_do_is_refused_before_anything_is_sent(make, settings, message):
    nowhere = make(url="http://127.0.0.1:9")
    for ask in (nowhere.generate, nowhere.stream, lambda prompt, **told: nowhere.generate_batch([prompt], **told)):
        with pytest.raises(ConfigError, match=message):
            ask("hi", **settings)
    with pytest.raises(ConfigError, match=message):
        await nowhere.agenerate("hi", **settings)
    if "form" not in settings:
        with pytest.raises(ConfigError, match=message):
            make(**settings)


def test_prompts_without_an_answer_are_refused(engine):
    with pytest.raises(ConfigError, match="the prompt is empty"):
        engine.generate_batch(["hi", ""])
    with pytest.raises(ConfigError, match="tools of its own"):
        engine.generate(Conversation((Message("user", "hi"),), (Tool("clock"),)))


def test_a_model_that_is_not_served_is_refused_when_it_is_loaded(make):
    with pytest.raises(ModelError, match=r"model 'gpt' is not served \(hint: models are tiny, tiny:brand"):
        make(model="gpt").load()


@pytest.mark.parametrize("name", ["verify", "encode", "request", "model", "head", "compare"])
def test_what_needs_the_model_here_says_where_it_is(make, local, name):
    engine = make(head="brand", url="http://127.0.0.1:9")
    asked = {"compare": lambda: engine.compare(local, "hi"), "model": lambda: engine.model, "head": lambda: engine.head}
    with pytest.raises(ConfigError, match=r"runs in http://127.0.0.1:9/v1: .* not in this process"):
        asked.get(name, lambda: getattr(engine, name)("hi"))()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "is not an address"),
        ("ftp://h", "is not an address"),
        ("http://[::1", "is not an address"),
        ("http://h:99999", "is not an address"),
        ("http://h:port", "is not an address"),
        ("http://me:pw@h", "holds a password"),
    ],
)
def test_addresses_are_checked(url, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Address.of(url)
    assert "pw" not in str(caught.value)


def test_a_bare_address_gets_its_path():
    assert Address.of("http://h:1").base_url == Address.of("http://h:1/v1/").base_url == "http://h:1/v1"
    assert Address.of("http://h:1/models/a/v1").base_url == "http://h:1/models/a/v1"


def test_a_loaded_model_is_not_sent(make):
    with pytest.raises(ConfigError, match="can't be sent to a server"):
        make(model=(1, 2))


def test_the_extra_is_named_where_it_is_missing(make, monkeypatch):
    monkeypatch.setattr(connection, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"mara-integrations\[client\]"):
        make()


# --- copies and keys


def test_copies_answer_alike_and_show_no_key(engine):
    engine = engine.with_settings(head="brand")
    again = pickle.loads(pickle.dumps(engine))

    assert copy.deepcopy(engine) is engine
    assert again.generate("hi").text == engine.generate("hi").text
    assert "brand" in repr(again) and "secret" not in repr(again) + repr(again.address)
    again.close()


@pytest.mark.parametrize("variable", ["MARA_API_KEY", "OPENAI_API_KEY"])
def test_keys_come_from_the_environment(make, monkeypatch, variable):
    monkeypatch.setenv(variable, "secret")
    assert make(api_key=None, max_new_tokens=2).generate("hi").text


def test_an_engine_that_is_dropped_leaves_no_connection(server):
    engine = ServerEngine(Address.of(server.url, "secret"), "tiny", max_new_tokens=2)
    engine.generate("hi")
    del engine
    gc.collect()
    with ServerEngine(Address.of(server.url, "secret"), "tiny", max_new_tokens=2) as other:
        assert other.generate("hi").text  # the loop works on
