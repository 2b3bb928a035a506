"""One worker for each loaded model, whatever threads ask for it at once; models don't wait for each other."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from mara_integrations.engine import workers
from mara_integrations.engine.workers import ModelLease, worker_for
from mara_integrations.errors import EngineClosedError
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.testing import tiny_model, tiny_tokenizer

WAIT_S = 60


@pytest.fixture
def packing(monkeypatch):
    """The names of the models that were packed, in order; `during` is called in the middle of it."""
    packing, backend_of = SimpleNamespace(names=[], during=lambda model: None), workers.backend_of

    def slow_backend_of(model, limits=None):
        packing.names.append(model.name)
        packing.during(model)
        return backend_of(model, limits)

    monkeypatch.setattr(workers, "backend_of", slow_backend_of)
    return packing


def adopted(name):
    model = tiny_model()
    model.config._name_or_path = name
    return load_model(ModelSpec((model, tiny_tokenizer())))


def at_once(*calls):
    """Make the calls in a thread each, all at the same time; returns what they return."""
    barrier = threading.Barrier(len(calls))

    def run(call):
        barrier.wait(WAIT_S)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(WAIT_S) for future in [pool.submit(run, call) for call in calls]]


def test_threads_that_ask_at_once_load_and_pack_a_model_once(folder_model, packing):
    packing.during = lambda model: time.sleep(0.2)  # the others ask in the meantime
    leases = [ModelLease(ModelSpec(folder_model)) for _ in range(4)]

    made = at_once(*(lambda lease=lease: (lease.model, lease.worker) for lease in leases))

    assert len({id(model) for model, _ in made}) == len({id(worker) for _, worker in made}) == 1
    assert packing.names == [folder_model]


def test_two_models_are_packed_at_the_same_time(packing):
    both = threading.Barrier(2)
    packing.during = lambda model: both.wait(WAIT_S)  # each is in the middle of it when the other comes
    one, other = adopted("one"), adopted("other")

    first, second = at_once(lambda: worker_for(one), lambda: worker_for(other))

    assert first is not second
    assert sorted(packing.names) == ["one", "other"]


def test_a_loaded_model_is_handed_out_while_another_is_being_packed(packing):
    ready, slow = adopted("ready"), adopted("slow")
    worker = worker_for(ready)
    has_begun, may_end = threading.Event(), threading.Event()

    def during(model):
        has_begun.set()
        assert may_end.wait(WAIT_S)

    packing.during = during
    with ThreadPoolExecutor(1) as pool:
        packed = pool.submit(worker_for, slow)
        try:
            assert has_begun.wait(WAIT_S)
            assert worker_for(ready) is worker
            assert ModelLease(ModelSpec((ready.model, ready.tokenizer))).status.is_healthy
        finally:
            may_end.set()
        assert packed.result(WAIT_S) is worker_for(slow)


def test_a_worker_that_is_made_while_its_last_engine_closes_is_ended(packing):
    model = adopted("closing")
    lease = ModelLease(ModelSpec(model))
    has_begun = threading.Event()
    closing = threading.Thread(target=lambda: has_begun.wait(WAIT_S) and lease.close())

    def during(_):
        has_begun.set()
        while not lease.is_closed:
            time.sleep(0.001)

    packing.during = during
    closing.start()
    with pytest.raises(EngineClosedError, match="the engine is closed"):
        _ = lease.worker
    closing.join(WAIT_S)
    assert not closing.is_alive()
    packing.during = lambda model: None
    assert ModelLease(ModelSpec(model)).worker.is_healthy
    assert packing.names == ["closing", "closing"]  # nothing was left of the first


def test_one_of_two_engines_that_closes_leaves_the_worker(packing):
    model = adopted("kept")
    staying, leaving = ModelLease(ModelSpec(model)), ModelLease(ModelSpec(model))
    worker = staying.worker
    assert leaving.worker is worker

    leaving.close()
    assert worker.is_healthy and staying.worker is worker

    staying.close()
    assert not worker.is_healthy
