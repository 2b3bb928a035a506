"""The queue in front of the decoder: bounded, first come first served, and left without harm."""

from __future__ import annotations

import threading

import pytest

from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.request import Request
from mara_integrations.engine.scheduler import Scheduler
from mara_integrations.engine.tickets import ThreadTicket
from mara_integrations.engine.worker import Worker
from mara_integrations.errors import EngineClosedError
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import ScriptedBackend


@pytest.fixture
def gate():
    """Holds the model until it is set."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def full(gate):
    """A worker with one request in the model's hands and two that wait, which is all it takes; and their tickets."""
    has_begun = threading.Event()

    def script(tokens):
        has_begun.set()
        assert gate.wait(30)
        return [1.0, 0.0]

    worker = Worker(Decoder(ScriptedBackend(script, 2), Scheduler(max_live=1)), max_waiting=2)
    tickets = [worker.submit(request(), ThreadTicket())]
    assert has_begun.wait(30)
    return worker, [*tickets, *(worker.submit(request(), ThreadTicket()) for _ in range(2))]


def request():
    return Request([1], SamplingParams(max_new_tokens=2))


def submitting(worker, ticket):
    """Submit in a thread, which has to be waiting shortly after; what it raises is kept."""
    raised = []

    def run():
        try:
            worker.submit(request(), ticket)
        except EngineClosedError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive(), "there is no room"
    return thread, raised


def test_whoever_finds_the_queue_full_waits_and_is_served_in_turn(full, gate):
    worker, tickets = full
    thread, _ = submitting(worker, late := ThreadTicket())
    gate.set()
    thread.join(30)
    assert not thread.is_alive()
    for ticket in (*tickets, late):
        assert list(ticket)[-1].generation.token_ids == (0, 0)


def test_closing_sends_those_away_who_wait_for_room(full, gate):
    worker, _ = full
    thread, raised = submitting(worker, ThreadTicket())
    worker.close()
    thread.join(30)
    assert len(raised) == 1 and "closed" in str(raised[0])


def test_a_cancelled_request_waits_no_longer_and_takes_no_turn(full, gate):
    worker, tickets = full
    thread, _ = submitting(worker, gone := ThreadTicket())
    gone.cancel()
    gate.set()
    thread.join(30)
    assert not thread.is_alive()
    assert all(list(ticket)[-1].generation is not None for ticket in tickets)
    backend = worker.decoder.backend
    assert max(segment.row for fed in backend.fed for segment in fed) == 2, "three rows were ever opened"


def test_closing_is_heard_by_those_who_run_and_those_who_wait_and_nothing_more_is_decoded(full, gate):
    worker, tickets = full
    worker.close()
    gate.set()
    for ticket in tickets:
        with pytest.raises(EngineClosedError, match="closed before the reply was finished"):
            list(ticket)
    worker.join(30)
    backend = worker.decoder.backend
    assert len(backend.fed) == 1 and backend.open_rows == 0
