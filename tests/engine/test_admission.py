"""Who begins when: within the batch, within the memory, first come first served, and without a look at a long queue."""

from __future__ import annotations

import pytest
import torch
from decoding import mixed_requests, prompt, reference, references

from mara_integrations.engine.backends.cuda_graphs import GraphedBackend
from mara_integrations.engine.backends.fused import FusedBackend
from mara_integrations.engine.backends.packed import PackedBackend
from mara_integrations.engine.backends.prefix_cache import PrefixCache
from mara_integrations.engine.backends.serial import SerialBackend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.engine.request import Request
from mara_integrations.engine.scheduler import Scheduler
from mara_integrations.engine.tickets import ThreadTicket
from mara_integrations.engine.worker import Worker
from mara_integrations.errors import ConfigError
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import ScriptedBackend, random_head, tiny_model

MIB = 1 << 20


class Heavy(ScriptedBackend):
    """A backend whose tokens take a MiB each."""

    def __init__(self):
        super().__init__(lambda tokens: [0.0, 1.0], vocab_size=2)
        self.most_open = 0

    def bytes_for(self, sizes):
        return super().bytes_for(sizes) * MIB

    def feed(self, segments):
        self.most_open = max(self.most_open, self.open_rows)
        return super().feed(segments)


def heavy_decoder(num_mib):
    return Decoder(Heavy(), limits=EngineLimits(kv_bytes=num_mib * MIB))


def test_requests_wait_until_the_memory_they_may_need_is_free():
    decoder = heavy_decoder(100)
    requests = [Request([1] * 20, SamplingParams(max_new_tokens=20)) for _ in range(5)]  # 40 MiB each

    done = decoder.run(requests)

    assert decoder.backend.most_open == 2 and all(len(s.token_ids) == 20 for s in done)


def test_a_small_request_does_not_overtake_a_large_one_that_waits():
    decoder = heavy_decoder(100)
    large, small = SamplingParams(max_new_tokens=60), SamplingParams(max_new_tokens=2)
    order = []

    decoder.run([Request([1], p) for p in (large, large, small)], lambda s: order.append(len(s.token_ids)))

    assert order == [60, 60, 2] or order == [60, 2, 60], "the second large one began before the small one or with it"
    assert decoder.backend.fed[0][0].row == 0 and len(decoder.backend.fed[0]) == 1


def test_a_request_that_can_never_fit_is_refused_at_once():
    worker = Worker(heavy_decoder(100))
    head = random_head(3, accept_rate=1.0)
    request = Request([1] * 30, SamplingParams(max_new_tokens=50, top_k=40), head=head)

    with pytest.raises(
        ConfigError, match=r"may need 120 MiB .* of 80 tokens and 40 candidates; the engine has 100 MiB"
    ):
        worker.submit(request, ThreadTicket())

    fits = Request([1] * 30, SamplingParams(max_new_tokens=50, top_k=20), head=head)
    assert list(worker.submit(fits, ThreadTicket()))[-1].generation is not None


def test_a_batch_with_a_request_that_can_never_fit_leaves_nothing_behind():
    decoder = heavy_decoder(100)
    with pytest.raises(ConfigError, match="may need"):
        decoder.run([Request([1], SamplingParams(max_new_tokens=5)), Request([1] * 200)])
    assert decoder.is_idle and decoder.backend.open_rows == 0


class Graphed(GraphedBackend):
    """A capture is a plain call."""

    def __init__(self, model):
        super().__init__(model, lambda run: run)


@pytest.mark.parametrize("kind", [FusedBackend, PackedBackend, Graphed])
def test_keys_and_values_stay_within_their_bytes_and_tokens_are_the_references(kind):
    model, held, live = tiny_model(max_position_embeddings=2048), [], []

    class Watched(kind):
        def feed(self, segments):
            hidden = super().feed(segments)
            held.append(self.num_bytes)
            live.append(len(segments))
            return hidden

    backend = Watched(model)
    Decoder(backend).run([Request([1, 2], SamplingParams(max_new_tokens=2))])  # the bytes of a token are known now
    long = [Request(prompt(700, seed), SamplingParams(max_new_tokens=4)) for seed in range(5)]
    requests = [*mixed_requests(model, count=4), *long]

    done = Decoder(backend, Scheduler(max_live=9), limits=EngineLimits(kv_bytes=MIB)).run(requests)

    assert [s.token_ids for s in done] == references(model, requests)
    assert max(held) <= MIB and 1 < max(live) < 9


class Counting(PrefixCache):
    def __init__(self):
        super().__init__()
        self.count = 0

    def longest(self, token_ids, hashes=None):
        self.count += 1
        return super().longest(token_ids, hashes)


def test_a_long_queue_behind_a_prompt_that_is_being_read_costs_little():
    model = tiny_model(max_position_embeddings=2048)
    shared = prompt(600)
    decoder = Decoder(PackedBackend(model), Scheduler(prefill_chunk=64))
    decoder.prefixes = Counting()
    for seed in range(500):
        decoder.submit(Request([*shared, *prompt(20, seed)], SamplingParams(max_new_tokens=1)))
    decoder.step()
    decoder.prefixes.count = 0
    decoder.step()
    assert decoder.prefixes.count <= 64 and len(decoder.scheduler.live) == 1
    decoder.abort()


def test_prompts_that_can_not_be_kept_are_read_together():
    backend = ScriptedBackend(lambda tokens: [0.0, 1.0], vocab_size=2)  # keeps no prefix
    requests = [Request([1] * 20 + [i % 2] * 5, SamplingParams(max_new_tokens=1)) for i in range(8)]
    Decoder(backend).run(requests)
    assert len(backend.fed) == 1


@pytest.mark.parametrize("limit", [0, 1000])
def test_prompts_too_large_to_be_kept_are_read_together(limit):
    model, counts = tiny_model(), []

    class Watched(PackedBackend):
        def feed(self, segments):
            counts.append(len(segments))
            return super().feed(segments)

    backend = Watched(model)
    Decoder(backend).run([Request([1, 2], SamplingParams(max_new_tokens=1))])
    del counts[:]
    requests = [Request([*prompt(30), i], SamplingParams(max_new_tokens=1)) for i in range(1, 9)]
    decoder = Decoder(backend, limits=EngineLimits(prefix_cache_bytes=limit))
    decoder.run(requests)
    assert counts == [8] and decoder.prefixes.num_bytes == 0


@pytest.mark.parametrize("kind", [FusedBackend, SerialBackend])
@pytest.mark.parametrize("fallback", ["first", "last", "best"])
def test_rejected_candidates_are_forgotten_where_they_are_many(kind, fallback):
    """A head that rejects all of 150 candidates: the row holds few of them, and the fallback is fed again."""
    model, held = tiny_model(), []

    class Watched(kind):
        def feed(self, segments):
            held.extend(len(segment.token_ids) for segment in segments if segment.siblings)
            return super().feed(segments)

    head = random_head(32, accept_rate=0.0)
    sampling = SamplingParams(max_new_tokens=5, top_k=150, top_p=1.0)
    request = Request(prompt(6), sampling, GateParams(fallback=fallback), head, keep_states=True)
    backend = Watched(model)

    done = Decoder(backend).run([request])[0]

    assert done.token_ids == reference(model, request.prompt_ids, head, sampling, request.gate)
    assert max(held) <= backend.max_siblings and sum(held) == 5 * 150
    with torch.inference_mode():
        whole = torch.tensor([[*request.prompt_ids, *done.token_ids]])
        want = model.model(whole).last_hidden_state[0, 5:]
    torch.testing.assert_close(torch.stack(done.states), want, rtol=1e-3, atol=1e-3)


def test_the_distribution_of_many_candidates_is_drawn_from_exactly():
    model = tiny_model()
    head = random_head(32, "residual", seed=2)
    for seed in range(2):
        sampling = SamplingParams(max_new_tokens=2, temperature=4.0, top_k=256, top_p=1.0, seed=seed)
        done = Decoder(FusedBackend(model)).run([Request(prompt(6), sampling, head=head)])[0]
        assert done.token_ids == reference(model, prompt(6), head, sampling)
