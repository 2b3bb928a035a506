"""Gated decoding equals the slow reference: every form, rule and family, in batches of mixed lengths and settings."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from decoding import FAMILIES, mixed_requests, prompt, reference, references

from mara_integrations.engine.backends.packed import PackedBackend
from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.backends.serial import SerialBackend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.request import Request
from mara_integrations.engine.scheduler import Scheduler
from mara_integrations.errors import ModelError
from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.head import MARAHead
from mara_integrations.sampling import GateParams, SamplingParams
from mara_integrations.testing import ScriptedBackend, random_head, tiny_model

SERIAL_FAMILIES = {"bloom": {}}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_batch_gives_the_reference_tokens(family):
    model = tiny_model(family, **FAMILIES[family])
    requests = list(mixed_requests(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fallback to the serial path
        backend = make_backend(model)
    assert isinstance(backend, PackedBackend)
    done = Decoder(backend, Scheduler(max_live=3, prefill_chunk=6)).run(requests)
    assert [s.token_ids for s in done] == references(model, requests)
    assert sum(s.stats.rejected for s in done) > 8, "the heads have to disagree for this to say anything"


def test_torchs_default_dtype_changes_nothing():
    """Loading a model in bfloat16 changes it for all threads, those that decode too."""
    model = tiny_model()
    requests = list(mixed_requests(model))
    want = references(model, requests)
    torch.set_default_dtype(torch.bfloat16)
    try:
        backend = make_backend(model)
        done = Decoder(backend).run(requests)
    finally:
        torch.set_default_dtype(torch.float32)
    assert type(backend) is type(make_backend(model))
    assert [s.token_ids for s in done] == want


@pytest.mark.parametrize("family", SERIAL_FAMILIES)
def test_models_without_trees_take_the_serial_path_and_say_so(family):
    model = tiny_model(family)
    requests = list(mixed_requests(model, count=3))
    with pytest.warns(UserWarning, match="serial path"):
        backend = make_backend(model)
    assert isinstance(backend, SerialBackend)
    assert [s.token_ids for s in Decoder(backend).run(requests)] == references(model, requests)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_the_serial_path_is_exact_with_sliding_windows(family):
    model = tiny_model(family, **FAMILIES[family])
    requests = list(mixed_requests(model, count=3))
    assert [s.token_ids for s in Decoder(SerialBackend(model)).run(requests)] == references(model, requests)


@pytest.mark.parametrize("knee", [1, 8, 200])
def test_the_schedule_changes_no_token(knee):
    model = tiny_model()
    requests = list(mixed_requests(model))
    done = Decoder(make_backend(model), Scheduler(max_live=4, knee=knee)).run(requests)
    assert [s.token_ids for s in done] == references(model, requests)


@pytest.mark.parametrize("form", ["residual", "value", "paper", "q"])
def test_strength_zero_is_the_base_model(form):
    model = tiny_model()
    head = random_head(32, form)
    ids = prompt(8)
    want = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, pad_token_id=0)[
        0, len(ids) :
    ].tolist()
    request = Request(ids, SamplingParams(max_new_tokens=12), GateParams(strength=0.0), head)
    assert Decoder(make_backend(model)).run([request])[0].token_ids == want


@pytest.mark.parametrize("form", ["residual", "value", "q"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_untrained_head_is_the_base_model_with_the_same_random_numbers(form, temperature):
    model = tiny_model()
    head = MARAHead(HeadConfig(form=form, hidden_size=32))
    sampling = SamplingParams(max_new_tokens=12, temperature=temperature, seed=5)
    gated, base = Decoder(make_backend(model)).run([Request(prompt(8), sampling, head=h) for h in (head, None)])
    assert gated.token_ids == base.token_ids
    assert gated.stats.accepted + gated.stats.forced + gated.stats.single == 12


def test_base_sampling_has_the_distribution_of_generate():
    model, ids, n = tiny_model(vocab_size=64), prompt(5, vocab_size=64), 1500
    sampling = {"temperature": 0.8, "top_k": 6, "top_p": 0.9}
    requests = [Request(ids, SamplingParams(max_new_tokens=1, seed=i, **sampling)) for i in range(n)]
    ours = torch.tensor([s.token_ids[0] for s in Decoder(make_backend(model)).run(requests)]).bincount(minlength=64)
    torch.manual_seed(0)
    theirs = model.generate(torch.tensor([ids] * n), do_sample=True, max_new_tokens=1, pad_token_id=0, **sampling)
    theirs = theirs[:, -1].bincount(minlength=64)
    assert (ours > 0).sum() > 1
    assert ((ours - theirs).abs() < 4.5 * (ours + theirs).clamp_min(9).sqrt()).all()


def test_an_eos_candidate_is_judged_like_any_other_and_ends_the_reply():
    model, ids = tiny_model(), prompt(8)
    head = random_head(32, accept_rate=0.3)
    tokens = Decoder(make_backend(model)).run([Request(ids, SamplingParams(max_new_tokens=9), head=head)])[0].token_ids
    eos = frozenset([tokens[4]])
    done = Decoder(make_backend(model)).run(
        [Request(ids, SamplingParams(max_new_tokens=9), head=head, eos_token_ids=eos)]
    )[0]
    assert done.token_ids == tokens[: tokens.index(tokens[4]) + 1] and done.finish_reason == "stop"


def test_kept_states_are_those_of_a_plain_forward():
    model = tiny_model()
    for head in (None, random_head(32, accept_rate=0.3), random_head(32, "value")):
        done = Decoder(make_backend(model)).run(
            [Request(prompt(8), SamplingParams(max_new_tokens=6), head=head, keep_states=True)]
        )[0]
        whole = torch.tensor([[*prompt(8), *done.token_ids]])
        with torch.inference_mode():
            want = model(whole, output_hidden_states=True).hidden_states[-1][0, 7:]
        torch.testing.assert_close(torch.stack(done.states), want, rtol=1e-3, atol=1e-3)


def test_the_model_stays_usable_by_others_after_we_serve_it():
    model, ids = tiny_model("gemma2", **FAMILIES["gemma2"]), torch.tensor([prompt(9), prompt(9, seed=1)])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padding has to be honoured
    with torch.inference_mode():
        before = model(ids, attention_mask=mask).logits
        make_backend(model)
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, 3:], before[:, 3:])


def _users_hook(module, args, output):
    pass


def test_a_model_that_was_served_and_verified_has_the_hooks_it_had_and_pickles():
    model, head = tiny_model(), random_head(32)
    model.model.layers[0].register_forward_hook(_users_hook)
    Decoder(make_backend(model)).run([Request(prompt(8), SamplingParams(max_new_tokens=2), head=head)])
    reference(model, prompt(8), head, SamplingParams(max_new_tokens=2))
    assert [hook for module in model.modules() for hook in module._forward_hooks.values()] == [_users_hook]
    loaded = pickle.loads(pickle.dumps(model))
    assert len(loaded(torch.tensor([prompt(8)]), output_hidden_states=True).hidden_states) == 3


def test_a_failed_forward_leaves_the_decoder_clean():
    backend = ScriptedBackend(lambda tokens: [1.0] * 5 if len(tokens) < 4 else [][1], vocab_size=5)
    decoder = Decoder(backend)
    with pytest.raises(ModelError, match="logits of this request failed: IndexError"):
        decoder.run([Request([1], SamplingParams(max_new_tokens=9))])
    assert decoder.is_idle and backend.open_rows == 0
    assert len(decoder.run([Request([1], SamplingParams(max_new_tokens=2))])[0].token_ids) == 2


def test_a_lone_survivor_is_taken_without_asking_the_head():
    backend = ScriptedBackend(lambda tokens: [9.0, 0.0, 0.0, 0.0], vocab_size=4)
    head = random_head(5, accept_rate=0.0)
    done = Decoder(backend).run([Request([1], SamplingParams(max_new_tokens=3), head=head)])[0]
    assert done.token_ids == [0, 0, 0] and done.stats.single == 3 and done.stats.rejected == 0


def test_a_model_that_is_no_causal_decoder_is_refused():
    with pytest.raises(ModelError, match="can't be decoded exactly"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_backend(tiny_model("bert", is_decoder=False))


def test_trace_and_counts_tell_the_same_story():
    model = tiny_model()
    request = Request(
        prompt(8), SamplingParams(max_new_tokens=15), GateParams(trace=True), random_head(32, accept_rate=0.3)
    )
    result = Decoder(make_backend(model)).run([request])[0].result()
    assert [p.token_ids[p.taken] for p in result.trace] == list(result.token_ids)
    outcomes = [p.outcome for p in result.trace]
    stats = result.stats
    assert [outcomes.count(o) for o in ("accepted", "single", "fallback")] == [
        stats.accepted,
        stats.single,
        stats.fallbacks,
    ]
    for position in result.trace:
        visited = position.accept_logits
        if position.outcome == "accepted":
            assert visited[-1] > 0 and all(z <= 0 for z in visited[:-1]) and position.taken == len(visited) - 1
    rejected = sum(len(p.accept_logits) - (p.outcome == "accepted") for p in result.trace)
    assert stats.rejected == rejected > 0
