"""Many calls of `ChatMARA` at once, and calls that are left: counted in forwards."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
import torch
from langchain_core.messages import AIMessage

from mara_integrations import ChatMARA
from mara_integrations.errors import ConfigError, ModelError
from mara_integrations.runtime import worker_for

LONG = 300  # tokens


# --- many at once


def test_a_batch_is_decoded_together(llm: ChatMARA, count_forwards: Any) -> None:
    inputs = [f"question {i}" for i in range(20)]
    alone = [llm.invoke(text).content for text in inputs]
    forwards = count_forwards(llm)

    assert [message.content for message in llm.batch(inputs)] == alone
    assert forwards.widest > 8  # more than the six threads LangChain would use on two cores
    assert sorted(llm.batch_as_completed(inputs[:3]))[1][1].content == alone[1]


async def test_an_async_batch_is_decoded_together(llm: ChatMARA, count_forwards: Any) -> None:
    inputs = [f"question {i}" for i in range(20)]
    alone = [llm.invoke(text).content for text in inputs]
    forwards = count_forwards(llm)

    assert [message.content for message in await llm.abatch(inputs)] == alone
    assert forwards.widest == 20


def test_max_concurrency_is_respected(llm: ChatMARA, count_forwards: Any) -> None:
    forwards = count_forwards(llm)

    llm.batch(["a", "b", "c", "d"], config={"max_concurrency": 2})

    assert forwards.widest <= 2


def test_a_failing_input_of_a_batch_leaves_the_others(llm: ChatMARA) -> None:
    good, bad = llm.batch(["hi", "x" * 3000], return_exceptions=True)

    assert isinstance(good, AIMessage)
    assert isinstance(bad, ConfigError)


def test_a_hundred_calls_from_threads_and_tasks_give_the_answers_of_one_by_one(llm: ChatMARA) -> None:
    inputs = [f"question {i}" for i in range(100)]
    settings = [{"temperature": 1.0, "seed": i, "head": [None, llm.head][i % 2], "max_tokens": 6} for i in range(100)]
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


async def test_cancelling_ainvoke_stops_within_a_token(llm: ChatMARA, count_forwards: Any) -> None:
    forwards = count_forwards(llm)
    task = asyncio.create_task(llm.ainvoke("hi", max_tokens=LONG, head=None))
    await forwards.reached(10)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert await forwards.settled() <= 2
    assert forwards.count < LONG / 2


async def test_leaving_an_async_stream_stops_within_a_token(llm: ChatMARA, count_forwards: Any) -> None:
    forwards = count_forwards(llm)

    async for _ in llm.astream("hi", max_tokens=LONG, head=None):
        break
    await asyncio.sleep(0)

    await forwards.settled()
    assert forwards.count < LONG / 4


@pytest.mark.parametrize("how", ["break", "close"])
async def test_leaving_a_stream_stops_within_a_token(llm: ChatMARA, count_forwards: Any, how: str) -> None:
    forwards = count_forwards(llm)
    stream = llm.stream("hi", max_tokens=LONG, head=None)

    next(stream)
    if how == "close":
        stream.close()
    del stream

    assert await forwards.settled() <= 2
    assert forwards.count < LONG / 4


def test_an_error_in_the_model_reaches_the_caller_and_leaves_the_engine_clean(
    llm: ChatMARA, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = llm.invoke("hi").content

    def broken(segments: Any) -> torch.Tensor:
        raise RuntimeError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(worker_for(llm.engine.model).decoder.backend, "feed", broken)
        with pytest.raises(ModelError, match="no memory left"):
            llm.invoke("hi")

    assert llm.invoke("hi").content == answer


async def test_leaving_an_async_stream_stops_before_the_event_loop_gets_its_turn(
    llm: ChatMARA, count_forwards: Any
) -> None:
    forwards = count_forwards(llm)

    async for _ in llm.astream("hi", max_tokens=LONG, head=None):
        break
    left_at = forwards.count
    time.sleep(0.2)  # noqa: ASYNC251  # the loop is busy, as with a reader's own work

    assert forwards.count - left_at <= 2
