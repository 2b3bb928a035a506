"""A fault ends the request that has it, with an error that says what failed; others get their tokens unchanged."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from decoding import prompt, reference

from mara_integrations.engine.backends.fused import FusedBackend
from mara_integrations.engine.backends.packed import PackedBackend
from mara_integrations.engine.backends.protocol import Segment
from mara_integrations.engine.backends.serial import SerialBackend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.request import Constraint, Request
from mara_integrations.engine.tickets import ThreadTicket
from mara_integrations.engine.worker import Worker
from mara_integrations.errors import ConfigError, EngineClosedError, HeadError, ModelError
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import ScriptedBackend, random_head, tiny_model

WAIT_S = 30
LONG = SamplingParams(max_new_tokens=10, temperature=0.8, seed=3)


class Failing(Constraint):
    """Fails at its third token, in one of its methods."""

    is_cut_short = False

    def __init__(self, method, error=None):
        self.method, self.error = method, error or ValueError("a dead end")
        self.count = 0

    def _reach(self, method):
        self.count += method == self.method
        if method == self.method and self.count == 3:
            raise self.error

    def mask(self, logits):
        self._reach("mask")

    def accept(self, token_id):
        self._reach("accept")

    def certain(self):
        self._reach("certain")
        return []


class Forbidding(Failing):
    """Leaves no token from the third position on."""

    def __init__(self, value=-torch.inf):
        super().__init__("none")
        self.value = value

    def mask(self, logits):
        self.count += 1
        if self.count > 2:
            logits.fill_(self.value)


class FailingText:
    text, stopped = "", False

    def __init__(self, method):
        self.method, self.count = method, 0

    def push(self, token_id):
        self.count += 1
        if self.method == "push" and self.count == 3:
            raise UnicodeError("half a character")

    def finish(self):
        if self.method == "finish":
            raise UnicodeError("half a character")


def head_of(value, form="paper"):
    """A head whose scores are `value`."""
    head = random_head(32, form)
    (head.linear2 if form == "q" else head.output_linear).bias.fill_(value)
    return head


def freed_head(form="paper"):
    """A head that can't be evaluated."""
    head = random_head(32, form)
    del head.linear1
    return head


POISONED = {
    "mask": (dict(constraint=Failing("mask")), ModelError, "grammar or logits processors .* ValueError: a dead end"),
    "accept": (dict(constraint=Failing("accept")), ModelError, "grammar or logits processors .* a dead end"),
    "certain": (dict(constraint=Failing("certain")), ModelError, "grammar or logits processors .* a dead end"),
    "own error": (dict(constraint=Failing("mask", ConfigError("too deep"))), ConfigError, "too deep"),
    "forbids all": (dict(constraint=Forbidding()), ModelError, "no token may come next"),
    "nan mask": (dict(constraint=Forbidding(torch.nan)), ModelError, "logits are not finite"),
    "inf mask": (dict(constraint=Forbidding(torch.inf)), ModelError, "logits are not finite"),
    "text": (dict(text=FailingText("push")), ModelError, "text of this reply failed: UnicodeError: half a character"),
    "end of text": (dict(text=FailingText("finish")), ModelError, "text of this reply failed"),
    "nan head": (dict(head=head_of(torch.nan)), HeadError, "head are not finite"),
    "inf head": (dict(head=head_of(torch.inf)), HeadError, "head are not finite"),
    "nan q head": (dict(head=head_of(torch.nan, "q")), HeadError, "head are not finite"),
    "inf q head": (dict(head=head_of(torch.inf, "q")), HeadError, "head are not finite"),
    "freed head": (dict(head=freed_head()), HeadError, "head of this request failed: AttributeError: .*linear1"),
    "freed q head": (dict(head=freed_head("q")), HeadError, "head of this request failed: AttributeError: .*linear1"),
}  # fmt: skip


def innocents():
    forms = ("paper", "residual", "value", "q")
    heads = [None, *(random_head(32, form, accept_rate=0.4, seed=1) for form in forms)]
    return [Request(prompt(5 + 4 * i, seed=i), LONG, head=head) for i, head in enumerate(heads)]


def run_all(worker, requests):
    """Tokens of each, or the error that its caller heard."""
    tickets, heard = [worker.submit(request, ThreadTicket()) for request in requests], []
    for ticket in tickets:
        try:
            heard.append(list(list(ticket)[-1].generation.token_ids))
        except Exception as error:
            heard.append(error)
    return heard


@pytest.fixture(scope="module")
def served():
    """A worker, and what the reference says to those who do no harm."""
    model = tiny_model()
    want = [reference(model, r.prompt_ids, r.head, r.sampling, r.gate) for r in innocents()]
    worker = Worker(Decoder(FusedBackend(model)))
    yield worker, want
    worker.close()


@pytest.mark.parametrize("name", POISONED)
def test_a_poisoned_request_ends_alone(name, served):
    (settings, kind, said), (worker, want) = POISONED[name], served

    *heard, error = run_all(worker, [*innocents(), Request(prompt(9), LONG, **settings)])

    assert heard == want
    with pytest.raises(kind, match=said):
        raise error
    assert worker.is_healthy


@pytest.mark.parametrize("kind", [FusedBackend, PackedBackend, SerialBackend])
def test_a_forward_that_fails_for_one_row_ends_that_row(kind):
    model, good = tiny_model(), innocents()
    want = [reference(model, r.prompt_ids, r.head, r.sampling, r.gate) for r in good]

    class Short(kind):
        def feed(self, segments):
            if any(len(segment.token_ids) > 30 for segment in segments):
                raise IndexError("index out of range in self")
            return super().feed(segments)

    *heard, error = run_all(Worker(Decoder(Short(model))), [*good, Request(prompt(31), LONG)])

    assert heard == want
    with pytest.raises(ModelError, match="forward on this request failed: IndexError: index out of range"):
        raise error


def test_a_serial_forward_that_fails_half_way_changes_no_row():
    model = tiny_model()
    backend, segments = SerialBackend(model), []
    with torch.inference_mode():
        rows = [backend.open() for _ in range(2)]
        for row in rows:
            backend.feed([Segment(row, [1, 2, 3])])
        segments = [Segment(rows[0], [4, 5]), Segment(rows[1], [999])]
        with pytest.raises(IndexError):
            backend.feed(segments)
        got = backend.feed([Segment(rows[0], [4, 5])])
        want = model.model(torch.tensor([[1, 2, 3, 4, 5]])).last_hidden_state[0, -2:]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_end_their_request(value):
    backend = ScriptedBackend(lambda t: [value, 1.0] if t[0] == 7 and len(t) > 3 else [0.0, 1.0], vocab_size=8)
    worker = Worker(Decoder(backend))
    good, bad = run_all(worker, [Request([1], LONG), Request([7], LONG)])
    if value == -torch.inf:  # one token may be impossible
        assert len(bad) == 10
    else:
        with pytest.raises(ModelError, match="logits are not finite"):
            raise bad
    assert len(good) == 10 and backend.open_rows == 0


def test_logits_that_are_all_minus_infinity_end_their_request():
    worker = Worker(Decoder(ScriptedBackend(lambda t: [-torch.inf] * 4, vocab_size=4)))
    with pytest.raises(ModelError, match="logits are not finite"):
        raise run_all(worker, [Request([1], LONG)])[0]


def test_hidden_states_that_are_not_finite_are_the_models_fault():
    class Overflowing(ScriptedBackend):
        def feed(self, segments):
            hidden = super().feed(segments)
            hidden[:, 0] = torch.nan
            return hidden

    backend = Overflowing(lambda t: [0.0, 1.0, 0.5], vocab_size=3)
    with pytest.raises(ModelError, match="hidden states are not finite"):
        raise run_all(Worker(Decoder(backend)), [Request([1], LONG, head=random_head(4))])[0]


@pytest.mark.parametrize("settings", [
    {"temperature": 1e-38}, {"temperature": 1e-45}, {"temperature": -1.0}, {"temperature": float("nan")},
    {"min_candidates": 2**63}, {"min_candidates": 10**5}, {"top_k": 2**63}, {"max_new_tokens": 2**40},
    {"stop": ("x",) * 1000}, {"stop": ("x" * 10_000,)}, {"seed": 2**63}, {"top_p": float("inf")},
])  # fmt: skip
def test_numbers_out_of_bounds_are_refused_by_name(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SamplingParams.of(**settings)


def test_the_smallest_temperature_allowed_is_decoded():
    model = tiny_model()
    sampling = SamplingParams(max_new_tokens=6, temperature=1e-4, seed=1, top_k=256, top_p=1.0)
    tokens = Decoder(FusedBackend(model)).run([Request(prompt(5), sampling)])[0].token_ids
    assert tokens == reference(model, prompt(5), None, sampling)


def test_filters_that_are_switched_off_are_decoded_under_a_head():
    vocab_size = 20_000
    model = tiny_model(vocab_size=vocab_size)
    head = random_head(32, accept_rate=0.02)
    sampling = SamplingParams(max_new_tokens=2, top_k=vocab_size, top_p=1.0)
    done = Decoder(FusedBackend(model)).run([Request(prompt(5), sampling, head=head)])[0]
    assert len(done.token_ids) == 2


def test_an_empty_prompt_is_refused_where_it_is_submitted():
    worker = Worker(Decoder(ScriptedBackend(lambda t: [0.0, 1.0], 2)))
    with pytest.raises(ConfigError, match="the prompt is empty"):
        worker.submit(Request([]), ThreadTicket())


def test_the_same_request_submitted_twice_is_answered_twice():
    worker, request = Worker(Decoder(ScriptedBackend(lambda t: [0.0, 1.0], 2))), Request([1], LONG)
    first, second = run_all(worker, [request, request])
    assert first == second and len(first) == 10


# --- faults of the engine


def waiting(worker, request):
    """Submit and wait in a thread; what the caller got is in the list once the thread has ended."""
    heard = []
    thread = threading.Thread(target=lambda: heard.extend(run_all(worker, [request])), daemon=True)
    thread.start()
    return thread, heard


class Sticky(ScriptedBackend):
    """Fails for good, closing rows included, once `is_broken` is set: as a CUDA device after a failed assertion."""

    def __init__(self):
        super().__init__(lambda t: [0.0, 1.0], vocab_size=2)
        self.is_broken = threading.Event()
        self.has_begun = threading.Event()

    def feed(self, segments):
        self.has_begun.set()
        assert self.is_broken.wait(WAIT_S)
        raise RuntimeError("CUDA error: device-side assert triggered")

    def close(self, row):
        raise RuntimeError("CUDA error: device-side assert triggered")


def test_a_failure_in_the_clean_up_is_heard_by_all_and_ends_the_worker():
    backend = Sticky()
    worker = Worker(Decoder(backend))
    callers = [waiting(worker, Request([1], LONG)) for _ in range(2)]
    assert backend.has_begun.wait(WAIT_S)
    callers += [waiting(worker, Request([1], LONG)) for _ in range(2)]  # these wait in the inbox

    backend.is_broken.set()

    for thread, heard in callers:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "nobody waits for ever"
        assert "CUDA error: device-side assert triggered" in str(heard[0])
    worker.join(WAIT_S)
    assert not worker.is_running and not worker.is_healthy and "CUDA error" in str(worker.failure)
    with pytest.raises(EngineClosedError, match="the engine has failed: RuntimeError: CUDA error"):
        worker.submit(Request([1]), ThreadTicket())


def test_a_failure_of_the_engine_is_heard_by_all_and_later_requests_are_served():
    class Failing(ScriptedBackend):
        is_broken = True

        def commit(self, rows, branches):
            if self.is_broken:
                raise RuntimeError("no such row")
            super().commit(rows, branches)

    backend = Failing(lambda t: [0.0, 1.0, 0.5], vocab_size=3)
    worker = Worker(Decoder(backend))
    gated = Request([1], LONG, GateParams(), random_head(4, accept_rate=1.0))
    for error in run_all(worker, [gated, gated]):
        with pytest.raises(ModelError, match="the engine failed: RuntimeError: no such row"):
            raise error
    backend.is_broken = False
    assert len(run_all(worker, [gated])[0]) == 10 and backend.open_rows == 0 and worker.is_healthy


def test_a_bug_in_the_decoder_thread_is_heard_too():
    class Exiting(Failing):
        def mask(self, logits):
            raise SystemExit(3)

    worker = Worker(Decoder(ScriptedBackend(lambda t: [0.0, 1.0], 2)))
    thread, heard = waiting(worker, Request([1], LONG, constraint=Exiting("none")))
    thread.join(WAIT_S)
    assert isinstance(heard[0], EngineClosedError) and not worker.is_healthy


def test_a_model_that_always_fails_is_not_healthy_until_a_forward_succeeds():
    class Flaky(ScriptedBackend):
        fails = True

        def feed(self, segments):
            if self.fails:
                raise RuntimeError("no memory left")
            return super().feed(segments)

    backend = Flaky(lambda t: [0.0, 1.0], vocab_size=2)
    worker = Worker(Decoder(backend))
    for count, _ in enumerate(itertools.repeat(None, 3)):
        assert worker.is_healthy, f"after {count} failures"
        assert isinstance(run_all(worker, [Request([1], LONG)])[0], ModelError)
    assert not worker.is_healthy and worker.failure is None
    backend.fails = False
    assert len(run_all(worker, [Request([1], LONG)])[0]) == 10 and worker.is_healthy


def test_out_of_memory_ends_the_rows_that_do_not_fit_alone():
    class Small(ScriptedBackend):
        def feed(self, segments):
            if sum(len(segment.token_ids) for segment in segments) > 17:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().feed(segments)

    worker = Worker(Decoder(Small(lambda t: [0.0, 1.0], vocab_size=2)))
    *fit, too_long = run_all(worker, [Request([1] * 8, LONG), Request([1] * 8, LONG), Request([1] * 20, LONG)])
    assert [len(tokens) for tokens in fit] == [10, 10]
    with pytest.raises(ModelError, match=r"out of memory.*lower kv_bytes"):
        raise too_long


def test_a_prefix_that_can_not_be_copied_is_no_fault():
    class Full(PackedBackend):
        def keep(self, row, length):
            raise torch.OutOfMemoryError("CUDA out of memory")

    model = tiny_model()
    sampling = SamplingParams(max_new_tokens=3)
    assert Decoder(Full(model)).run([Request(prompt(40), sampling)])[0].token_ids == reference(
        model, prompt(40), None, sampling
    )


def test_a_row_that_can_not_be_opened_ends_its_request():
    class Full(ScriptedBackend):
        def open(self, kept=None, length=0):
            if self.open_rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().open(kept, length)

    worker = Worker(Decoder(Full(lambda t: [0.0, 1.0], vocab_size=2)))
    first, second = run_all(worker, [Request([1], LONG), Request([1], LONG)])
    assert len(first) == 10 and "opening a row for this request failed" in str(second)
