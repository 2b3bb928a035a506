from __future__ import annotations

import gc
from importlib.util import find_spec

import pytest
import torch

from mara_integrations.engine.backends.protocol import Segment
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.engine.never import NeverConstraint
from mara_integrations.engine.refusals import refusals_of
from mara_integrations.engine.request import Request
from mara_integrations.engine.scheduler import Scheduler
from mara_integrations.engine.token_texts import TokenTexts
from mara_integrations.errors import ConfigError, ModelError
from mara_integrations.replies.text import TextStream
from mara_integrations.rewards.rules import TextRule
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import random_head, tiny_tokenizer

if not any(map(find_spec, ("llama_cpp", "xllamacpp"))):
    pytest.skip("llama.cpp is not installed", allow_module_level=True)

from decoding import mixed_requests, prompt
from gguf import GGUFReader
from tiny_gguf import oracle, write_gguf

from mara_integrations.engine.backends.llama_cpp import LlamaCppBackend
from mara_integrations.engine.oracle.llama_cpp import LlamaCppOracle
from mara_integrations.engine.oracle.verify import verify
from mara_integrations.models.gguf_outline import TensorPlace
from mara_integrations.models.llama_cpp.model import LlamaCppModel
from mara_integrations.models.llama_cpp.options import LlamaCppOptions

FEW = EngineLimits(max_live=8)


@pytest.fixture(scope="module")
def model():
    return oracle()


@pytest.fixture(scope="module")
def loaded(model, tmp_path_factory):
    return load(write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model))


def load(path):
    found = {tensor.name: tensor for tensor in GGUFReader(str(path)).tensors}
    places = [
        TensorPlace(int(found[name].data_offset), int(found[name].tensor_type), 257, 32, 128)
        for name in ("output.weight", "token_embd.weight")
    ]
    return LlamaCppModel(path, LlamaCppOptions(n_ctx=512, n_threads=1), *places)


@pytest.fixture
def backend(loaded):
    return LlamaCppBackend(loaded, FEW)


def plain(model, ids):
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return output.hidden_states[-1][0], output.logits[0]


def assert_close(ours, theirs):
    """Keys and values are in half precision there."""
    assert ours.shape == theirs.shape and float((ours - theirs).norm() / theirs.norm()) < 5e-3


def test_states_and_logits_are_those_of_transformers(backend, model):
    ids, row = prompt(300), backend.open()
    states = backend.feed([Segment(row, ids)])  # more than one batch of llama.cpp
    want_states, want_logits = plain(model, ids)
    assert_close(states, want_states)
    assert_close(backend.next_logits(states[-1:], [row]), want_logits[-1:])


def test_of_a_prompt_only_the_last_state_is_computed(backend):
    ids, rows = prompt(40), [backend.open(), backend.open()]
    whole = backend.feed([Segment(rows[0], ids)])
    last = backend.feed([Segment(rows[1], ids, only_last=True)])
    assert len(last) == 40 and not last[:-1].any()
    assert_close(last[-1], whole[-1])
    assert_close(*backend.next_logits(torch.stack([whole[-1], last[-1]]), rows))


def test_rows_in_one_forward_do_not_see_each_other(backend, model):
    prompts = [prompt(3, seed=1), prompt(17, seed=2), prompt(9, seed=3)]
    rows = [backend.open() for _ in prompts]
    states = backend.feed([Segment(row, ids) for row, ids in zip(rows, prompts, strict=True)])
    assert_close(states, torch.cat([plain(model, ids)[0] for ids in prompts]))
    logits = backend.next_logits(states[[2, 19, 28]], rows)
    assert_close(logits, torch.stack([plain(model, ids)[1][-1] for ids in prompts]))


def test_siblings_see_their_row_and_not_each_other(backend, model):
    ids, row = prompt(20), backend.open()
    backend.feed([Segment(row, ids)])
    first = backend.feed([Segment(row, [5, 6], siblings=True)])
    more = backend.feed([Segment(row, [7], siblings=True)])
    assert_close(torch.cat([first, more]), torch.stack([plain(model, [*ids, c])[0][-1] for c in (5, 6, 7)]))
    backend.commit([row], [1])
    assert_close(backend.next_logits(first[1:], [row]), plain(model, [*ids, 6])[1][-1:])
    after = backend.feed([Segment(row, [8])])
    assert_close(after, plain(model, [*ids, 6, 8])[0][-1:])


def test_dropped_siblings_leave_their_row_as_it_was(backend, model):
    ids, row = prompt(12), backend.open()
    backend.feed([Segment(row, ids)])
    before = backend.num_sequences
    backend.feed([Segment(row, [5, 6, 7], siblings=True)])
    backend.drop_siblings(row)
    assert backend.num_sequences == before
    assert_close(backend.feed([Segment(row, [9])]), plain(model, [*ids, 9])[0][-1:])


def test_a_kept_prefix_opens_rows_after_its_own_has_gone(backend, model):
    ids, row = prompt(30), backend.open()
    backend.feed([Segment(row, ids)])
    kept = backend.keep(row, 20)
    assert kept.num_bytes == backend.kept_bytes(20)
    backend.close(row)
    other = backend.open(kept, 15)
    assert_close(backend.feed([Segment(other, [1, 2, 3])]), plain(model, [*ids[:15], 1, 2, 3])[0][-3:])
    backend.close(other)
    del kept
    gc.collect()
    assert backend.num_sequences == 0


def test_a_forked_row_goes_its_own_way(backend, model):
    ids, row = prompt(10), backend.open()
    state = backend.feed([Segment(row, ids)])[-1:]
    twin = backend.fork(row)
    assert torch.equal(*backend.next_logits(state.expand(2, -1), [row, twin]))
    backend.feed([Segment(row, [4])])
    assert_close(backend.feed([Segment(twin, [5])]), plain(model, [*ids, 5])[0][-1:])


def test_a_forward_that_fails_changes_no_row(backend, model):
    ids, rows = prompt(10), [backend.open(), backend.open()]
    backend.feed([Segment(row, ids) for row in rows])
    before = backend.num_sequences
    with pytest.raises(ModelError, match="can't decode"):
        backend.feed([Segment(rows[0], [4]), Segment(rows[1], [5, 100_000], siblings=True)])
    assert backend.num_sequences == before
    assert_close(backend.feed([Segment(rows[0], [6])]), plain(model, [*ids, 6])[0][-1:])


def assert_references(loaded, model, requests, done):
    """The tokens of the reference on llama.cpp's own numbers, and almost always on those of transformers."""
    checks = [
        [verify(either, request, sequence.token_ids) for request, sequence in zip(requests, done, strict=True)]
        for either in (LlamaCppOracle(loaded), model)
    ]
    assert all(check.holds for check in checks[0])
    equal = [sum(check.disagreement is None for check in own) / len(requests) for own in checks]
    assert equal[0] > 0.9 and equal[1] > 0.8


def test_every_kind_of_request_has_the_tokens_of_the_reference(loaded, model):
    requests = list(mixed_requests(model, count=14))
    done = Decoder(LlamaCppBackend(loaded, FEW), Scheduler(max_live=4), limits=FEW).run(requests)
    assert_references(loaded, model, requests, done)
    assert sum(sequence.stats.rejected for sequence in done) > 20  # the heads had something to say


@pytest.mark.parametrize("head", [None, "q", "paper"])
def test_patterns_are_kept_out_of_replies(loaded, model, head):
    rule, tokenizer = r"re:[ -~]{2}", tiny_tokenizer()  # two characters of ASCII
    refusals = refusals_of(TokenTexts.of(tokenizer, 257, (), {0}), [rule], (), {0})

    def requests(never):
        for seed in range(6):
            yield Request(
                prompt(3 + seed, seed),
                SamplingParams(max_new_tokens=24, temperature=2.0, top_k=257, top_p=1.0, seed=seed),
                head=random_head(model.config.hidden_size, head) if head else None,
                eos_token_ids=frozenset({0}),
                text=TextStream(tokenizer),
                constraint=NeverConstraint(refusals, 24) if never else None,
            )

    decoder = Decoder(LlamaCppBackend(loaded, FEW), Scheduler(max_live=4), limits=FEW)
    free, held = ([one.result().text for one in decoder.run(list(requests(never)))] for never in (False, True))

    assert any(map(TextRule(rule).violations, free)) and not any(map(TextRule(rule).violations, held))


def test_candidates_that_were_dropped_are_fed_again(loaded, model):
    limits = EngineLimits(max_live=100)
    backend = LlamaCppBackend(loaded, limits)
    assert backend.max_siblings == 1
    requests = list(mixed_requests(model))
    assert_references(loaded, model, requests, Decoder(backend, limits=limits).run(requests))


def test_a_decoder_stays_within_the_room_that_is_set_aside(loaded):
    limits = EngineLimits(max_live=8, kv_bytes=1 << 20, prefix_cache_bytes=64 << 10)
    backend = LlamaCppBackend(replace_options(loaded, n_ctx=4096), limits)
    decoder = Decoder(backend, limits=limits)
    assert decoder.kv_bytes <= 1 << 20 and decoder.prefixes.max_bytes <= 64 << 10
    tokens = decoder.kv_bytes // backend.kept_bytes(1)
    with pytest.raises(ConfigError, match="kv_bytes"):
        decoder.check(Request(prompt(10), SamplingParams(max_new_tokens=tokens)))
    requests = [Request(prompt(tokens // 3 - 99, seed=i), SamplingParams(max_new_tokens=99)) for i in range(4)]
    assert all(sequence.finish_reason == "length" for sequence in decoder.run(requests))
    decoder.prefixes.clear()
    gc.collect()
    assert backend.num_sequences == 0


def replace_options(loaded, **options):
    twin = object.__new__(LlamaCppModel)
    twin.__dict__.update(loaded.__dict__, options=loaded.options.updated(**options))
    return twin


def test_more_replies_than_sequences_are_refused(loaded):
    with pytest.raises(ConfigError, match=r"max_live=200 .* at most 115"):
        LlamaCppBackend(loaded, EngineLimits(max_live=200))


def test_logits_of_kept_states_are_products_with_the_output_embeddings(backend, model):
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(backend.logits(states), model.lm_head(states), rtol=1e-3, atol=1e-3)


def test_logits_of_kept_states_are_capped_as_the_file_says(model, tmp_path):
    states = 9 * torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    capped = load(write_gguf(tmp_path / "capped.gguf", model, final_logit_softcapping=2.0))
    with torch.inference_mode():
        want = 2.0 * torch.tanh(model.lm_head(states) / 2.0)
    assert want.abs().max() > 1.5
    torch.testing.assert_close(capped.logits(states), want, rtol=0.0, atol=0.01)  # embeddings in half precision


def test_logits_that_the_model_scales_are_refused(model, tmp_path):
    scaled = load(write_gguf(tmp_path / "scaled.gguf", model, logit_scale=0.5))
    with pytest.raises(ModelError, match=r"scaled.gguf.* scales its logits.*transformers"):
        scaled.logits(torch.zeros(1, 32))


def test_output_embeddings_are_the_rows_of_the_file(backend, model):
    ids = torch.tensor([0, 256, 5, 5])
    assert torch.equal(backend.output_embeddings(ids), model.get_output_embeddings().weight[ids])


def test_input_embeddings_are_the_rows_of_the_file(loaded, model):
    ids = torch.tensor([0, 256, 5, 5])
    assert torch.equal(loaded.input_embeddings(ids), model.get_input_embeddings().weight[ids])
