"""Limits: how many sequences at once, how large a body, how long to wait for a client, and when a generation stops."""

from __future__ import annotations

import asyncio

import pytest
from serving import CHAT, Caller, client_of, post, until
from starlette.datastructures import Headers

from mara_integrations.engine.limits import EngineLimits
from mara_integrations.errors import ConfigError
from mara_integrations.runtime import MARAEngine
from mara_integrations.server import create_app
from mara_integrations.server.errors import ClientClosedError, RefusalError
from mara_integrations.server.limits import (
    Admission,
    ServerLimits,
    all_or_none,
    in_thread,
    read_body,
    timed,
    while_connected,
)
from mara_integrations.testing import tiny_model, tiny_tokenizer

LONG = {**CHAT, "max_tokens": 400}

# --- sequences


def test_no_more_sequences_are_let_in_than_may_run():
    admission = Admission(3)
    with admission.reserve(2):
        with admission.reserve(1), pytest.raises(RefusalError, match="3 of at most 3 replies are running") as caught:
            admission.require_room()
        assert caught.value.status == 503 and caught.value.headers["retry-after"]
        with pytest.raises(RefusalError, match="try again later"):
            admission.reserve(2)
        assert admission.num_running == 2
    assert admission.num_running == 0


def test_a_request_that_never_fits_is_not_told_to_try_again():
    with pytest.raises(RefusalError, match="4 prompts; this server takes 3") as caught:
        Admission(3).reserve(4)
    assert caught.value.status == 400


@pytest.mark.parametrize("limit", [{"max_running": 0}, {"max_body_bytes": 0}, {"body_timeout_s": 0.0}])
def test_a_limit_that_lets_nothing_in_is_refused(engine, limit):
    (name,) = limit
    with pytest.raises(ConfigError, match=rf"{name}=0.* is not allowed"):
        create_app(engine, **limit)


def test_more_than_the_engine_lets_wait_is_refused():
    engine = MARAEngine((tiny_model(), tiny_tokenizer()), limits=EngineLimits(max_waiting=10))
    create_app(engine, max_running=10)
    with pytest.raises(ConfigError, match="max_running=11 is more than the engine's max_waiting=10"):
        create_app(engine, max_running=11)


@pytest.mark.parametrize("stream", [False, True])
async def test_of_simultaneous_requests_as_many_run_as_may(engine, stream):
    app = create_app(engine, name="tiny", max_running=3)
    async with client_of(app) as client:
        body = {**CHAT, "max_tokens": 40, "stream": stream}
        answers = await asyncio.gather(*[client.post("/v1/chat/completions", json=body) for _ in range(12)])
        assert sorted(answer.status_code for answer in answers) == [200] * 3 + [503] * 9
        for answer in answers:
            if answer.status_code == 503:
                assert answer.json()["error"]["code"] == "overloaded" and answer.headers["retry-after"]
        await post(client, **CHAT)


async def test_each_prompt_of_a_request_is_a_sequence(engine):
    app = create_app(engine, name="tiny", max_running=3)
    async with client_of(app) as client:
        refused = await post(client, "completions", status=400, prompt=["a"] * 4, max_tokens=2)
        assert "4 prompts" in refused["error"]["message"]
        two = post(client, "completions", prompt=["a", "b"], max_tokens=40)
        answers = await asyncio.gather(two, post(client, "completions", status=503, prompt=["c", "d"], max_tokens=2))
        assert len(answers[0]["choices"]) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_while_all_room_is_taken_requests_are_refused_before_their_bodies_are_read(engine, stream):
    app = create_app(engine, name="tiny", max_running=1)
    caller = Caller(app, {**LONG, "stream": stream})
    call = asyncio.create_task(caller.call())
    await until(lambda: app.state.admission.num_running == 1)
    async with client_of(app) as client:
        response = await client.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
        assert response.status_code == 503
        caller.leaves.set()
        await asyncio.wait_for(call, 20)
        await post(client, **CHAT)


# --- what stops a generation


@pytest.mark.parametrize("stream", [True, False])
async def test_when_the_client_leaves_the_model_stops_within_a_token(app, engine, count_forwards, stream):
    forwards = count_forwards_of(count_forwards, engine)
    caller = Caller(app, {**LONG, "stream": stream})
    call = asyncio.create_task(caller.call())
    await forwards.reached(5)
    if stream:
        await until(caller.heard.is_set)
    caller.leaves.set()
    await asyncio.wait_for(call, 20)
    assert await forwards.settled() <= 2 and forwards.count < 200
    assert app.state.admission.num_running == 0
    async with client_of(app) as client:
        assert 'endpoint="chat",status="499"} 1.0' in (await client.get("/metrics")).text


async def test_when_one_prompt_is_refused_none_is_decoded(client, engine, count_forwards):
    forwards = count_forwards_of(count_forwards, engine)
    await post(client, "completions", status=400, prompt=["once", "upon", "x" * 600], max_tokens=400)
    assert await forwards.settled() == 0 and forwards.count == 0


async def test_when_a_client_with_many_prompts_leaves_all_stop(app, engine, count_forwards):
    forwards = count_forwards_of(count_forwards, engine)
    caller = Caller(app, {"prompt": ["once", "upon", "a time"], "max_tokens": 400}, "/v1/completions")
    call = asyncio.create_task(caller.call())
    await forwards.reached(5)
    caller.leaves.set()
    await asyncio.wait_for(call, 20)
    assert await forwards.settled() <= 2 and forwards.count < 200


async def test_a_client_that_leaves_before_its_first_token_leaves_no_room_taken(app):
    async def leave_at_once():
        caller = Caller(app, {**LONG, "stream": True})
        caller.leaves.set()
        await asyncio.wait_for(caller.call(), 20)

    await asyncio.gather(*[leave_at_once() for _ in range(10)])
    assert app.state.admission.num_running == 0


def count_forwards_of(count_forwards, engine):
    class Asking:
        def __init__(self):
            self.engine = engine

    return count_forwards(Asking(), pause_s=0.003)


# --- bodies


def body_of(*parts, headers=None, max_bytes=10, timeout_s=5.0, pause_s=0.0):
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive():
        await asyncio.sleep(pause_s)
        return messages.pop(0)

    return read_body(receive, Headers(headers or {}), ServerLimits(max_body_bytes=max_bytes, body_timeout_s=timeout_s))


async def test_a_body_is_read_in_parts():
    assert await body_of(b"12345", b"67890") == b"1234567890"


@pytest.mark.parametrize("length", ["11", "9" * 5000, "-5", "x"])
async def test_a_body_that_says_it_is_too_large_is_not_read(length):
    with pytest.raises(RefusalError, match="more than 10 bytes") as caught:
        await read_body(None, Headers({"content-length": length}), ServerLimits(max_body_bytes=10))
    assert caught.value.status == 413


async def test_a_body_that_does_not_say_so_is_read_up_to_the_limit():
    with pytest.raises(RefusalError) as caught:
        await body_of(b"12345", b"678901", b"never read")
    assert caught.value.status == 413


async def test_a_body_that_trickles_in_is_given_up():
    with pytest.raises(RefusalError, match=r"did not arrive within 0\.05 s") as caught:
        await body_of(*[b"1"] * 9, timeout_s=0.05, pause_s=0.02)
    assert caught.value.status == 408 and caught.value.headers["connection"] == "close"


async def test_a_client_that_leaves_inside_its_body_is_gone():
    async def receive():
        return {"type": "http.disconnect"}

    with pytest.raises(ClientClosedError):
        await read_body(receive, Headers({}), ServerLimits())


async def test_bodies_over_the_limit_are_refused_over_http(engine):
    async with client_of(create_app(engine, name="tiny", max_body_bytes=200)) as client:
        error = (await post(client, status=413, **CHAT, user="x" * 200))["error"]
        assert error["code"] == "body_too_large" and "200 bytes" in error["message"]
        await post(client, **CHAT)


# --- the pieces


async def test_a_client_that_does_not_read_its_answer_is_gone():
    async def send(message):
        await asyncio.sleep(10)

    with pytest.raises(ClientClosedError):
        await timed(send, 0.01)({})


async def test_work_in_a_thread_is_awaited_even_when_its_caller_is_cancelled():
    began, may_end = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    ended = []

    def work():
        loop.call_soon_threadsafe(began.set)
        asyncio.run_coroutine_threadsafe(may_end.wait(), loop).result(20)
        ended.append(True)

    task = asyncio.create_task(in_thread(work))
    await began.wait()
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended


async def test_the_first_failure_cancels_the_others():
    cancelled = []

    async def waits():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def fails():
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        await all_or_none([waits(), fails(), waits()])
    assert cancelled == [True, True]
    assert await all_or_none([asyncio.sleep(0, 1), asyncio.sleep(0, 2)]) == [1, 2]


async def test_work_ends_when_the_client_leaves():
    async def receive():
        return {"type": "http.disconnect"}

    with pytest.raises(ClientClosedError):
        await while_connected(receive, asyncio.sleep(60))


async def test_work_that_fails_raises_its_own_error():
    async def receive():
        await asyncio.sleep(60)

    async def fails():
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        await while_connected(receive, fails())
