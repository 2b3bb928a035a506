"""The store of keys and values: rows keep what was written to them, in memory that follows their lengths."""

from __future__ import annotations

import random

import pytest
import torch

from mara_integrations.engine.backends.kv_cache import KVCache, KVRectangle, capacity_for
from mara_integrations.engine.backends.packed import PackedBackend
from mara_integrations.engine.backends.protocol import RowSize, Segment
from mara_integrations.engine.backends.select import make_backend
from mara_integrations.testing import tiny_model

LAYERS, HEADS, WIDTH = 2, 2, 3


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def write(cache, handle, numbers):
    """Write one token for each number behind what a row holds; not counted yet."""
    start = cache.row(handle).num_used
    cache.reserve({handle: start + len(numbers)})
    row = cache.row(handle)
    states = torch.tensor(numbers)[:, None, None].expand(-1, HEADS, WIDTH)
    rows, slots = torch.full((len(numbers),), row.index), torch.arange(start, start + len(numbers))
    for layer in range(LAYERS):
        cache.write(layer, row.bucket, rows, slots, states + layer, -states - layer)


def held(cache, handle):
    """The numbers a row holds, checked in all layers."""
    row = cache.row(handle)
    if row.bucket is None:
        return []
    for layer, (keys, values) in row.bucket.layers.items():
        own = keys[row.index, :, : row.num_used]
        assert (own == own[:1, :, :1]).all() and (values[row.index, :, : row.num_used] == -own).all()
        assert keys.isfinite().all(), "what a mask hides must be finite"
        numbers = (own[0, :, 0] - layer).tolist()
    return numbers


@pytest.mark.parametrize("kind", [KVCache, KVRectangle])
@pytest.mark.parametrize("seed", range(4))
def test_rows_hold_what_was_written_to_them_whatever_happens_to_others(kind, seed):
    chance, cache, want, siblings = random.Random(seed), kind(), {}, {}
    for step in range(300):
        match chance.choice(["open", "extend", "extend", "hold", "commit", "retract", "close", "copy", "drop"]):
            case "open" if len(want) < 12:
                handle = cache.open()
                want[handle], siblings[handle] = [], []
            case "copy" if want:
                source = chance.choice(list(want))
                length = chance.randint(0, len(want[source]))
                handle = cache.open(cache.keep(source, length), length)
                want[handle], siblings[handle] = want[source][:length], []
            case "extend" if want:
                handle, numbers = chance.choice(list(want)), [float(step)] * chance.choice([1, 3, 60])
                if not siblings[handle]:
                    write(cache, handle, numbers)
                    cache.extend(handle, len(numbers))
                    want[handle] += numbers
            case "hold" if want:
                handle, count = chance.choice(list(want)), chance.randint(1, 5)
                numbers = [float(1000 * step + i) for i in range(count)]
                write(cache, handle, numbers)
                cache.hold(handle, count)
                siblings[handle] += numbers
            case "commit":
                handles = [handle for handle in want if siblings[handle]]
                taken = [chance.randrange(len(siblings[handle])) for handle in handles]
                cache.commit(handles, taken)
                for handle, index in zip(handles, taken, strict=True):
                    want[handle].append(siblings[handle][index])
                    siblings[handle] = []
            case "drop" if want:
                handle = chance.choice(list(want))
                cache.drop_siblings(handle)
                siblings[handle] = []
            case "retract" if want:
                handle = chance.choice(list(want))
                if len(want[handle]) > 2 and not siblings[handle]:
                    is_held = chance.random() < 0.5
                    cache.retract(handle, 2, is_held)
                    siblings[handle] = want[handle][-2:-1] if is_held else []
                    del want[handle][-2:]
            case "close" if want:
                handle = chance.choice(list(want))
                cache.close(handle)
                del want[handle], siblings[handle]
        for handle, numbers in want.items():
            assert held(cache, handle) == numbers + siblings[handle]
        if kind is KVCache:
            assert cache.num_bytes <= cache.bytes_for([len(n) + len(siblings[h]) or 1 for h, n in want.items()])
    for handle in list(want):
        cache.close(handle)
    assert cache.num_bytes == 0 or kind is KVRectangle


def test_capacities_are_few_and_waste_little():
    capacities = {capacity_for(n) for n in range(1, 10_000)}
    assert len(capacities) < 25 and all(capacity_for(n) >= n for n in range(1, 10_000))
    assert all(capacity_for(n) <= 1.5 * n for n in range(64, 1024))
    assert all(capacity_for(n) <= 1.25 * n for n in range(1025, 10_000))


def test_a_long_row_does_not_lengthen_the_others():
    backend = make_backend(tiny_model(max_position_embeddings=8192))
    rows = [backend.open() for _ in range(64)]
    backend.feed([Segment(row, [1] * 20) for row in rows])
    for _ in range(8):
        backend.feed([Segment(rows[0], [1] * 500)])
    assert backend.num_bytes <= 2 * (64 * 64 + 4020) * backend.kept_bytes(1)
    backend.close(rows[0])
    assert backend.num_bytes <= 1.3 * 63 * 64 * backend.kept_bytes(1), "its memory is given back"
    for row in rows[1:]:
        backend.close(row)
    assert backend.num_bytes == 0


def test_rows_of_many_lengths_see_what_plain_forwards_see():
    model = tiny_model()
    backend = make_backend(model)
    texts = [
        torch.randint(1, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 70, 150, 300)
    ]
    rows = [backend.open() for _ in texts]
    for text, row in zip(texts, rows, strict=True):
        backend.feed([Segment(row, text)])
    siblings = backend.feed([Segment(row, [5, 6, 7], siblings=True) for row in rows])
    backend.commit(rows, [0, 1, 2, 1])
    after = backend.feed([Segment(rows[i], [9] * (1 + i % 2)) for i in (2, 0, 3, 1)])
    want = []
    for text in texts:
        want += [model.model(torch.tensor([[*text, c]])).last_hidden_state[0, -1] for c in (5, 6, 7)]
    torch.testing.assert_close(siblings, torch.stack(want), rtol=1e-3, atol=1e-3)
    taken, want = (5, 6, 7, 6), []
    for i in (2, 0, 3, 1):
        tail = [9] * (1 + i % 2)
        want.append(model.model(torch.tensor([[*texts[i], taken[i], *tail]])).last_hidden_state[0, -len(tail) :])
    torch.testing.assert_close(after, torch.cat(want), rtol=1e-3, atol=1e-3)


def test_numbers_that_are_not_finite_do_not_outlive_their_row():
    model = tiny_model()
    backend = PackedBackend(model)

    def fed(tokens, value=None):
        """Feed to a new row beside another, with the embedding of token 7 set to `value`."""
        table = model.get_input_embeddings().weight.data
        kept = table[7].clone()
        if value is not None:
            table[7] = value
        row = backend.open()
        hidden = backend.feed([Segment(row, tokens)])
        table[7] = kept
        return row, hidden

    other, _ = fed([1, 2, 3])
    poisoned, hidden = fed([7] * 30, torch.nan)
    assert hidden.isnan().any()
    last, _ = fed([4, 5])
    backend.close(poisoned)  # the last row moves into its place
    again, got = fed([1, 2, 3])
    after = backend.feed([Segment(other, [8]), Segment(last, [8]), Segment(again, [8])])
    want = model.model(torch.tensor([[1, 2, 3, 8]])).last_hidden_state[0, -1]
    assert got.isfinite().all() and after.isfinite().all()
    torch.testing.assert_close(after[0], want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after[2], want, rtol=1e-3, atol=1e-3)


def test_memory_is_what_was_announced():
    backend = make_backend(tiny_model())
    sizes = [RowSize(20 + 30 * i, i) for i in range(9)]
    for size in sizes:
        row = backend.open()
        backend.feed([Segment(row, [1] * size.num_tokens)])
        if size.num_siblings:
            backend.feed([Segment(row, [1] * size.num_siblings, siblings=True)])
    assert 0 < backend.num_bytes <= backend.bytes_for(sizes) <= 2.5 * sum(map(sum, sizes)) * backend.kept_bytes(1)
