"""Kept prefixes save forwards and change no token."""

from __future__ import annotations

import pytest
import torch
from decoding import reference
from hypothesis import given
from hypothesis import strategies as st

from mara_integrations.engine.backends.packed import PackedBackend
from mara_integrations.engine.backends.prefix_cache import BLOCK_TOKENS, PrefixCache, shared
from mara_integrations.engine.backends.protocol import Segment
from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.backends.serial import SerialBackend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.request import Request
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import random_head, tiny_model

SYSTEM = torch.randint(1, 256, (40,), generator=torch.Generator().manual_seed(9)).tolist()


class Counting(PackedBackend):
    """Counts the tokens it is fed."""

    fed = 0

    def feed(self, segments):
        self.fed += sum(len(segment.token_ids) for segment in segments)
        return super().feed(segments)


class Kept:
    def __init__(self, num_bytes):
        self.num_bytes = num_bytes


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12))
def test_shared_is_the_length_of_the_common_beginning(a, b):
    n = shared(a, b)
    assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])


def test_a_shared_system_prompt_is_read_once_by_requests_that_come_together():
    model = tiny_model()
    head = random_head(32, accept_rate=0.4)
    sampling = SamplingParams(max_new_tokens=3)
    requests = [Request([*SYSTEM, *range(i, i + 5)], sampling, head=head) for i in range(1, 9)]
    backend = Counting(model)
    decoder = Decoder(backend)
    done = decoder.run(requests)
    assert [s.token_ids for s in done] == [reference(model, r.prompt_ids, head, sampling) for r in requests]
    replies = sum(s.stats.fed for s in done)
    assert backend.fed - replies <= len(SYSTEM) + 5 * len(requests)


def test_the_next_turn_of_a_conversation_continues_the_last():
    model = tiny_model()
    backend = Counting(model)
    decoder = Decoder(backend)
    sampling = SamplingParams(max_new_tokens=8)
    first = decoder.run([Request(SYSTEM, sampling, head=random_head(32, "value"))])[0]
    before, second = backend.fed, [*SYSTEM, *first.token_ids, 7, 8, 9]
    reply = decoder.run([Request(second, sampling)])[0]
    assert reply.token_ids == reference(model, second, None, sampling)
    assert backend.fed - before - reply.stats.fed <= 4, "the last token of the first reply, and the new ones"


def test_memory_is_bounded_and_the_least_recently_used_goes_first():
    cache = PrefixCache(max_bytes=100)
    prompts = [[i] * BLOCK_TOKENS for i in range(4)]
    for prompt in prompts[:3]:
        cache.add(prompt, lambda: Kept(30))
    cache.longest([*prompts[0], 5])
    cache.add(prompts[3], lambda: Kept(30))
    assert [cache.longest([*p, 5])[1] > 0 for p in prompts] == [True, False, True, True] and cache.num_bytes == 90
    cache.add([9] * BLOCK_TOKENS, lambda: Kept(1000))
    assert cache.num_bytes == 90, "one too large is not kept"


def test_their_number_is_bounded_too():
    cache = PrefixCache(max_entries=2)
    for i in range(3):
        cache.add([i] * BLOCK_TOKENS, lambda: Kept(1))
    assert [cache.longest([*[i] * BLOCK_TOKENS, 5])[1] > 0 for i in range(3)] == [False, True, True]


def test_a_longer_prefix_takes_the_place_of_the_one_it_continues():
    cache = PrefixCache()
    cache.add([1] * 20, lambda: Kept(1))
    cache.add([1] * 30, lambda: Kept(1))
    cache.add([1] * 25, lambda: pytest.fail("it is kept already"))
    assert cache.num_bytes == 1 and cache.longest([1] * 40)[1] == 30


def test_the_last_prompt_token_is_always_fed():
    cache = PrefixCache()
    cache.add([1] * 20, lambda: Kept(1))
    assert cache.longest([1] * 20)[1] == 19


@pytest.mark.parametrize("kind", [PackedBackend, SerialBackend])
def test_a_forked_row_goes_its_own_way(kind):
    model = tiny_model()
    backend = kind(model)
    with torch.inference_mode():
        row = backend.open()
        backend.feed([Segment(row, SYSTEM)])
        fork = backend.fork(row)
        a, b = backend.feed([Segment(row, [1, 2]), Segment(fork, [3, 4])]).split(2)
        plain = [
            model(torch.tensor([[*SYSTEM, *x]]), output_hidden_states=True).hidden_states[-1][0, -2:]
            for x in ([1, 2], [3, 4])
        ]
    torch.testing.assert_close(torch.stack([a, b]), torch.stack(plain), rtol=1e-3, atol=1e-3)


def test_backends_that_can_not_cut_a_state_keep_nothing():
    model = tiny_model()
    decoder = Decoder(SerialBackend(model))
    requests = [Request([*SYSTEM, i], SamplingParams(max_new_tokens=2)) for i in range(3)]
    want = [s.token_ids for s in Decoder(make_backend(model)).run(requests)]
    assert [s.token_ids for s in decoder.run(requests)] == want and decoder.prefixes.num_bytes == 0
