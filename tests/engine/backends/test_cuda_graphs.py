"""The rectangles that CUDA graphs run on give the reference's tokens; here a capture is a call that has its habits."""

from __future__ import annotations

import pytest
import torch
from decoding import FAMILIES, mixed_requests, prompt, references

from mara_integrations.engine.backends.cuda_graphs import GraphedBackend
from mara_integrations.engine.backends.protocol import Segment
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.request import Request
from mara_integrations.engine.scheduler import ACCELERATOR_KNEE, CPU_KNEE, Scheduler
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import random_head, tiny_model


class Captures:
    """Counts captures. Like a graph, a replay overwrites its one output and needs the store to be where it was."""

    def __init__(self):
        self.count = self.replays = 0
        self.backend = None

    def __call__(self, run):
        self.count += 1
        output, store = run(), self.store()

        def replay():
            assert self.store() == store, "a graph writes to where the store was when it was captured"
            self.replays += 1
            return output.copy_(run())

        return replay

    def store(self):
        return [t.data_ptr() for pair in self.backend._cache.bucket.layers.values() for t in pair]


def graphed(model):
    captures = Captures()
    captures.backend = GraphedBackend(model, captures)
    return captures.backend, captures


@pytest.mark.parametrize("knee", [CPU_KNEE, ACCELERATOR_KNEE])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt_oss"])
def test_padded_rectangles_give_the_reference_tokens(family, knee):
    model = tiny_model(family, **FAMILIES[family])
    requests = list(mixed_requests(model))
    backend, captures = graphed(model)

    done = Decoder(backend, Scheduler(max_live=3, prefill_chunk=20, knee=knee)).run(requests)

    assert [s.token_ids for s in done] == references(model, requests)
    assert 0 < captures.count < captures.replays


def test_sizes_are_few_and_a_second_request_captures_nothing():
    backend, captures = graphed(tiny_model())
    decoder = Decoder(backend, Scheduler(knee=ACCELERATOR_KNEE))
    request = Request(prompt(20), SamplingParams(max_new_tokens=30), head=random_head(32, accept_rate=0.3))

    first = decoder.run([request])[0].token_ids
    count = captures.count
    decoder.prefixes.clear()
    assert decoder.run([request])[0].token_ids == first
    assert captures.count == count <= 4, "a width each, at one row and 256 slots"


def test_a_store_that_grows_is_captured_anew():
    model = tiny_model()
    backend, captures = graphed(model)
    row = backend.open()
    ids = prompt(300)
    hidden = [backend.feed([Segment(row, ids[start : start + 30])]) for start in range(0, 300, 30)]
    assert captures.count == 2, "256 slots, then 512"
    with torch.inference_mode():
        want = model.model(torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(torch.cat(hidden), want, rtol=1e-3, atol=1e-3)


def test_what_is_too_wide_runs_as_it_is():
    backend, captures = graphed(tiny_model())
    rows = [backend.open() for _ in range(9)]
    backend.feed([Segment(rows[0], prompt(49))])
    backend.feed([Segment(row, prompt(17)) for row in rows[1:]])
    assert captures.count == 0, "49 tokens in a row, and 16 rows of 48"
    backend.feed([Segment(row, [1, 2, 3]) for row in rows])
    assert captures.count == 1


def test_rows_that_feed_nothing_and_rows_that_are_closed_are_left_alone():
    model = tiny_model()
    backend, _ = graphed(model)
    kept, closed, other = (backend.open() for _ in range(3))
    ids = prompt(12)
    for row in (kept, closed, other):
        backend.feed([Segment(row, ids[:4])])
    backend.close(closed)  # another row moves into its place
    backend.feed([Segment(other, [5, 6, 7], siblings=True)])
    backend.feed([Segment(other, [8], siblings=True)])
    backend.commit([other], [3])
    got = backend.feed([Segment(kept, ids[4:]), Segment(other, [9])])
    with torch.inference_mode():
        want = [model.model(torch.tensor([tokens])).last_hidden_state[0] for tokens in (ids, [*ids[:4], 8, 9])]
    torch.testing.assert_close(got, torch.cat([want[0][4:], want[1][-1:]]), rtol=1e-3, atol=1e-3)


def test_padding_spares_a_long_row_that_feeds_nothing():
    model = tiny_model()
    backend, _ = graphed(model)
    long, short = backend.open(), backend.open()
    ids = prompt(300)
    backend.feed([Segment(long, ids[:299])])
    backend.feed([Segment(short, [1, 2, 3])])
    got = backend.feed([Segment(long, ids[299:])])
    with torch.inference_mode():
        want = model.model(torch.tensor([ids])).last_hidden_state[0, -1:]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_graphs_give_the_reference_tokens():
    model = tiny_model().cuda()
    requests = [
        Request(prompt(6 + i), SamplingParams(max_new_tokens=12, top_k=8), head=random_head(32, seed=i).cuda())
        for i in range(4)
    ]
    done = Decoder(GraphedBackend(model), Scheduler(max_live=3)).run(requests)
    assert [s.token_ids for s in done] == references(model, requests)
