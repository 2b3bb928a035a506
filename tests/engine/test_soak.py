"""A long run of everything at once: requests, cancellations, faults, changed heads; afterwards nothing is left of it.

Callers in threads and in an event loop submit requests of all kinds to one worker. Some leave early, some requests
fail, now and then the whole engine does. Whoever does no harm gets exactly the tokens of a decoder that has only this
request. The run is a series of rounds; after each of them, the worker is idle and heads may change.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from mara_integrations.engine.backends.fused import FusedBackend
from mara_integrations.engine.batch import BatchEntry
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.generation import Generation
from mara_integrations.engine.grammar import Grammar
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.engine.request import Constraint, Request
from mara_integrations.engine.sequence import Position, Sequence
from mara_integrations.engine.streams import Stream
from mara_integrations.engine.tickets import LoopTicket, ThreadTicket
from mara_integrations.engine.worker import Worker
from mara_integrations.errors import ConfigError, HeadError, MaraError, ModelError
from mara_integrations.heads.compose import ComposedHead, Head
from mara_integrations.heads.head import MARAHead
from mara_integrations.replies.families import FAMILIES
from mara_integrations.replies.forms import ReplyForm
from mara_integrations.replies.text import TextStream
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer

WAIT_S = 300
NUM_CALLERS, NUM_JOBS = 6, 30  # threads beside the event loop; requests of a round
NUM_KINDS = 60  # different innocent requests
MIB = 1 << 20
LIMITS = EngineLimits(max_live=8, max_waiting=16, prefill_chunk=64, kv_bytes=MIB, prefix_cache_bytes=MIB // 4)
RAISES, OVERFLOWS = 254, 255  # tokens of prompts for which the forward fails, or returns what is not finite
FAULTS = "mask", "accept", "certain", "nothing is left", "text", "head", "nan head", "raises", "overflows"
MODEL, TOKENIZER = tiny_model(max_position_embeddings=1024), tiny_tokenizer()
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}


class Backend(FusedBackend):
    """Counts its rows, and fails for two tokens, which it never makes candidates."""

    num_open = 0

    def open(self, *prefix):
        row = super().open(*prefix)
        self.num_open += 1
        return row

    def close(self, row):
        super().close(row)
        self.num_open -= 1

    def feed(self, segments):
        if any(RAISES in segment.token_ids for segment in segments):
            raise RuntimeError("index out of range in self")
        hidden = super().feed(segments)
        for segment, states in zip(segments, hidden.split([len(s.token_ids) for s in segments]), strict=True):
            if OVERFLOWS in segment.token_ids:
                states[:] = torch.nan
        return hidden

    def logits(self, hidden):
        logits = super().logits(hidden)
        logits[:, [RAISES, OVERFLOWS]] = -torch.inf
        return logits


class CountingDecoder(Decoder):
    """Counts its steps; fails as a whole in the next one where it is told to."""

    num_steps = 0
    fails_next = False

    def step(self):
        self.num_steps += 1
        if self.fails_next and self.scheduler.live:
            self.fails_next = False
            raise RuntimeError("the device is lost")
        return super().step()


class NoOdd(Constraint):
    """Allows tokens with even ids; fails at its `fails_at`-th token, in one of its methods."""

    def __init__(self, method: str = "", fails_at: int = 0) -> None:
        self.method, self.fails_at, self.count = method, fails_at, 0

    def _reach(self, method: str) -> None:
        self.count += method == self.method
        if method == self.method and self.count == self.fails_at:
            raise ValueError("a dead end")

    def mask(self, logits):
        self._reach("mask")
        logits[1::2] = -torch.inf
        if self.method == "nothing is left":
            self.count += 1
            if self.count == self.fails_at:
                logits.fill_(-torch.inf)

    def accept(self, token_id):
        self._reach("accept")

    def certain(self):
        self._reach("certain")
        return ()


class FailingText(TextStream):
    """Can't be read any more after some tokens."""

    left = 3

    def push(self, token_id):
        self.left -= 1
        if not self.left:
            raise UnicodeError("half a character")
        return super().push(token_id)


def grammar() -> Grammar:
    tag = ReplyForm(json_schema=SCHEMA).grammar(FAMILIES["qwen_3"])
    return Grammar(tag, tokenizer=TOKENIZER, vocab_size=256, eos_token_ids=[0])


# --- what is asked


@dataclass(frozen=True)
class Kind:
    """A kind of innocent request: whatever is drawn for it is the same each time that it is made.

    Attributes:
        seed: What it is drawn from.
    """

    seed: int

    def request(self, heads: dict[str, MARAHead]) -> Request:
        rng = random.Random(self.seed)
        weights = rng.choice([0.3, 1.0, 2.0])
        form = rng.choice([None, *heads])
        sampling = SamplingParams(
            max_new_tokens=rng.randint(1, 24),
            temperature=rng.choice([0.0, 0.7, 1.0, 1.5]),
            top_k=rng.choice([1, 2, 5, 12, 40]),
            top_p=rng.choice([0.5, 0.95, 1.0]),
            min_candidates=rng.choice([1, 1, 2]),
            seed=self.seed,
        )
        gate = GateParams(
            strength=1.0 if form and "paper" in form else rng.choice([0.0, 0.5, 1.0, 3.0]),
            selection=rng.choice(["auto", "auto", "first", "greedy", "sample"]),
            fallback=rng.choice(["first", "last", "best"]),
            trace=rng.random() < 0.3,
        )
        head: Head | None = heads[form] if form else None
        if head is not None and "paper" not in form and weights != 1.0:
            other = heads[rng.choice([name for name in heads if "paper" not in name and name != form])]
            head = ComposedHead({head: weights, other: 1.0})
        stop = rng.choice([(), (), ("a", "qq"), (chr(rng.randrange(97, 123)),)])
        return Request(
            prompt_ids=_prompt(rng),
            sampling=sampling,
            gate=gate,
            head=head,
            eos_token_ids=frozenset([0, *rng.sample(range(256), rng.choice([0, 2, 30]))]),
            text=rng.choice([None, TextStream(TOKENIZER, stop)]),
            constraint=rng.choice([lambda: None, lambda: None, NoOdd, grammar])(),
            keep_states=rng.random() < 0.1,
            keep_positions=rng.random() < 0.1,
        )


def _prompt(rng: random.Random) -> list[int]:
    """A prompt that is like others, repeats itself, or neither; of up to some 300 tokens."""
    begin = [[], list(range(1, 49)), [7, 8, 9] * 30][rng.randrange(3)]
    return [*begin, *(rng.randrange(1, RAISES) for _ in range(rng.choice([1, 5, 20, 200])))]


def poisoned(rng: random.Random, request: Request) -> tuple[type[MaraError], str]:
    """Make a request one that fails while it is decoded; returns the error that its caller hears."""
    request.constraint = request.text = None
    request.eos_token_ids = frozenset()
    request.sampling = request.sampling.updated(max_new_tokens=12, top_k=8, min_candidates=2)
    fault = rng.choice(FAULTS)
    match fault:
        case "text":
            request.text = FailingText(TOKENIZER)
            return ModelError, "text of this reply failed: UnicodeError"
        case "head" | "nan head":
            request.head = random_head(32, rng.choice(["paper", "residual", "q"]), seed=rng.randrange(1000))
            request.gate = request.gate.updated(strength=1.0)
            if fault == "head":
                del request.head.linear1
                return HeadError, "head of this request failed: AttributeError"
            last = request.head.linear2 if request.head.config.form == "q" else request.head.output_linear
            last.bias.fill_(torch.nan)
            return HeadError, "scores of this request's head are not finite"
        case "raises" | "overflows":
            # What is not finite stands where a reply is decided: it does not spread over the keys and values here.
            request.prompt_ids = [*request.prompt_ids, *((RAISES, 5) if fault == "raises" else (5, OVERFLOWS))]
            return ModelError, "forward on this request failed" if fault == "raises" else "are not finite"
        case "certain":  # asked for where the base model or Q-heads decide
            request.head = None
    request.constraint = NoOdd(fault, rng.randint(1, 6))
    said = "no token may come next" if fault == "nothing is left" else "grammar or logits processors .* a dead end"
    return ModelError, said


@dataclass
class Job:
    """A request, and what becomes of it.

    Attributes:
        request: What is asked.
        kind: Its kind, if it does no harm.
        error: What its caller has to hear otherwise: the class of the error, and what it says.
        leaves_after: Updates after which the caller leaves; 0 is at once, None is never.
        way: How the caller leaves.
        heard: Tokens that came.
        generation: The reply.
        raised: The error that came.
        is_over: The caller waits for nothing any more.
    """

    request: Request
    kind: Kind | None = None
    error: tuple[type[MaraError], str] | None = None
    leaves_after: int | None = None
    way: str = ""
    heard: list[int] = field(default_factory=list)
    generation: Generation | None = None
    raised: MaraError | None = None
    is_over: bool = False

    def run(self, worker: Worker) -> None:
        """Ask, and wait for the reply, in a thread."""
        try:
            ticket = worker.submit(self.request, ThreadTicket())
            if self.leaves_after == 0 and self.way == "dropped":
                del ticket
                return
            updates = Stream(iter(ticket), ticket.cancel)
            if self.leaves_after == 0:
                updates.close()
                return
            for count, update in enumerate(updates, 1):
                self._hear(update)
                if count == self.leaves_after:
                    if self.way == "cancelled":
                        ticket.cancel()
                    return
        except MaraError as error:
            self.raised = error
        finally:
            self.is_over = True

    async def arun(self, worker: Worker) -> None:
        """Ask, and wait for the reply, in an event loop."""
        ticket = LoopTicket()
        ticket.bind()
        try:
            await asyncio.to_thread(worker.submit, self.request, ticket)
            count = 0
            async for update in ticket:
                self._hear(update)
                count += 1
                if self.leaves_after is not None and count >= self.leaves_after:
                    if self.way == "cancelled":
                        asyncio.current_task().cancel()
                        await asyncio.sleep(0)
                    return
        except MaraError as error:
            self.raised = error
        finally:
            ticket.cancel()
            self.is_over = True

    def _hear(self, update: Any) -> None:
        self.heard += update.token_ids
        self.generation = update.generation or self.generation


# --- the run


class Soak:
    """One worker, its callers, and what a decoder says to each kind of request when it has nothing else to do."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.backend = Backend(MODEL)
        self.decoder = CountingDecoder(self.backend, limits=LIMITS)
        self.worker = Worker(self.decoder)
        self.alone = Decoder(Backend(MODEL))
        self.heads: dict[str, MARAHead] = {}
        for name in ("paper", "paper 2", "residual", "residual 2", "value", "value 2", "q", "q 2"):
            self._renew(name)
        self.replies: dict[Kind, tuple[Generation, set[MARAHead]]] = {}  # and the heads they were made with
        self.num_jobs = Counter[str]()

    def _renew(self, name: str) -> None:
        rate = self.rng.choice([0.9, 0.4, 0.1])
        self.heads[name] = random_head(32, name.split()[0], accept_rate=rate, seed=self.rng.randrange(10**6))

    def change_heads(self) -> None:
        """Train a head that is in use, replace another."""
        trained, replaced = self.rng.sample(sorted(self.heads), 2)
        with torch.no_grad():
            for parameter in self.heads[trained].parameters():
                parameter.mul_(1.1)
        changed = {self.heads[trained], self.heads[replaced]}
        self._renew(replaced)
        self.replies = {kind: (reply, heads) for kind, (reply, heads) in self.replies.items() if not heads & changed}

    def reply_alone(self, kind: Kind) -> Generation:
        if kind not in self.replies:
            self.alone.prefixes.clear()
            request = kind.request(self.heads)
            (done,) = self.alone.run([request])
            self.replies[kind] = done.result(), set(request.head.parts) if request.head else set()
        return self.replies[kind][0]

    def job(self) -> Job:
        rng, kind = self.rng, Kind(self.rng.randrange(NUM_KINDS))
        job = Job(kind.request(self.heads), kind)
        fate = rng.random()
        if fate < 0.2:
            job.leaves_after, job.way = rng.randrange(4), rng.choice(["dropped", "cancelled", "closed"])
        elif fate < 0.4:
            job.kind, job.error = None, poisoned(rng, job.request)
        elif fate < 0.42:
            job.kind, job.error = None, (ConfigError, "the request may need")
            job.request.sampling = job.request.sampling.updated(max_new_tokens=1_000_000)
        elif fate < 0.44:
            job.kind, job.error, job.request.prompt_ids = None, (ConfigError, "the prompt is empty"), []
        return job

    def round(self) -> None:
        """Have all callers ask and leave; check what they heard, and that nothing is left."""
        jobs = [self.job() for _ in range(NUM_JOBS)]
        engine_fails = self.decoder.fails_next = self.rng.random() < 0.05
        sync, in_loop = jobs[: NUM_JOBS * 2 // 3], jobs[NUM_JOBS * 2 // 3 :]
        queue = iter(sync)

        def call() -> None:
            for job in queue:
                job.run(self.worker)

        async def call_in_loop() -> None:
            await asyncio.gather(*(job.arun(self.worker) for job in in_loop), return_exceptions=True)

        targets = [*[call] * NUM_CALLERS, lambda: asyncio.run(call_in_loop())]
        callers = [threading.Thread(target=target, daemon=True) for target in targets]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(WAIT_S)
            assert not caller.is_alive(), "nobody waits for ever"
        _until(lambda: self.worker.num_waiting == 0 and self.decoder.is_idle)
        self.decoder.fails_next = False
        for job in jobs:
            self._check(job, engine_fails)
        self._check_left()

    def _check(self, job: Job, engine_fails: bool) -> None:
        assert job.is_over
        said = str(job.raised or "")
        if engine_fails and "the engine failed: RuntimeError: the device is lost" in said:
            self.num_jobs["met a lost device"] += 1
        elif job.error is not None:
            kind, text = job.error
            with pytest.raises(kind, match=text):
                raise job.raised or AssertionError(f"no error, but {job.generation}")
            self.num_jobs["failed"] += 1
        else:
            assert job.raised is None, said
            want = self.reply_alone(job.kind)
            if job.leaves_after is None or job.generation is not None:
                self._check_reply(job, want)
                self.num_jobs["answered"] += 1
            else:
                assert job.heard == list(want.token_ids[: len(job.heard)])
                self.num_jobs["left"] += 1

    def _check_reply(self, job: Job, want: Generation) -> None:
        got = job.generation
        assert got is not None and job.heard == list(got.token_ids)
        assert (got.token_ids, got.text, got.finish_reason) == (want.token_ids, want.text, want.finish_reason), job.kind
        assert got.log_probs == pytest.approx(want.log_probs, abs=1e-3)
        same = "accepted", "rejected", "single", "forced", "fallbacks"  # `fed` depends on what else is decoded
        assert [getattr(got.stats, name) for name in same] == [getattr(want.stats, name) for name in same]
        if want.trace is not None:
            assert [(p.token_ids, p.taken, p.outcome) for p in got.trace] == [
                (p.token_ids, p.taken, p.outcome) for p in want.trace
            ]

    def _check_left(self) -> None:
        assert self.backend.num_open == 0 and self.backend.num_bytes == 0
        assert self.worker.num_live == self.worker.num_waiting == 0 and self.worker.is_healthy
        assert self.decoder.prefixes.num_bytes <= LIMITS.prefix_cache_bytes


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "the worker becomes idle"
        time.sleep(0.001)


def _memory() -> int:
    """Memory of the process, in bytes; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


def _objects() -> Counter[str]:
    """Live objects of one request each, and heads."""
    gc.collect()
    kinds = (Sequence, Position, BatchEntry, Request, ThreadTicket, LoopTicket, TextStream, Grammar, MARAHead)
    return Counter(type(each).__name__ for each in gc.get_objects() if issubclass(type(each), kinds))


IN_FULL = pytest.mark.skipif("MARA_TEST_SOAK" not in os.environ, reason="takes minutes; MARA_TEST_SOAK=1 runs it")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("num_steps", "most_growth"),  # of the process's memory in the second half; in a short run, much comes late
    [
        pytest.param(300, 64 * MIB, id="300"),
        pytest.param(10_000, 16 * MIB, id="10000", marks=[pytest.mark.slow, IN_FULL]),
    ],
)
def test_nothing_is_left_of_thousands_of_requests_and_none_is_harmed(num_steps, most_growth):
    pytest.importorskip("xgrammar")
    before = _objects()  # of other tests of this process
    soak = Soak(seed=0)
    memory = 0
    while soak.decoder.num_steps < num_steps:
        soak.round()
        soak.change_heads()
        if not memory and soak.decoder.num_steps >= num_steps / 2:
            gc.collect()
            memory = _memory()
    soak.worker.close()
    soak.worker.join(WAIT_S)

    assert not soak.worker.is_running
    assert all(soak.num_jobs[fate] for fate in ("answered", "failed", "left")), soak.num_jobs
    left = _objects() - before
    num_heads = left.pop("AfterstateHead") + left.pop("QHead")  # some are kept beside those that are in use
    assert not left and num_heads <= 4 * len(soak.heads)
    assert _memory() - memory < most_growth
