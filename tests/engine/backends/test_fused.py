"""The written-out layers give the model's own hidden states, and the reference's tokens, or are not taken."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from decoding import mixed_requests, prompt, references

from mara_integrations.engine.backends.fused import FusedBackend, PackedLinear
from mara_integrations.engine.backends.packed import PackedBackend
from mara_integrations.engine.backends.protocol import Segment
from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.scheduler import Scheduler
from mara_integrations.testing import tiny_model

LLAMA_SHAPED = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama with scaled positions": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                            "original_max_position_embeddings": 16},
    },
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {},
}  # fmt: skip


@pytest.mark.parametrize("family", LLAMA_SHAPED)
def test_llama_shaped_models_run_fused_and_give_the_reference_tokens(family):
    model = tiny_model(family.split()[0], **LLAMA_SHAPED[family])
    requests = list(mixed_requests(model))
    backend = make_backend(model)
    assert isinstance(backend, FusedBackend)
    for kind in (backend, PackedBackend(model)):
        done = Decoder(kind, Scheduler(max_live=3, prefill_chunk=6)).run(requests)
        assert [s.token_ids for s in done] == references(model, requests)


@pytest.mark.parametrize("fewest", [1, 7])
def test_padding_to_rows_that_kernels_like_changes_no_token(fewest, monkeypatch):
    monkeypatch.setattr("mara_integrations.engine.backends.fused._FEWEST_ROWS", fewest)
    model = tiny_model()
    requests = list(mixed_requests(model, count=3))
    assert [s.token_ids for s in Decoder(FusedBackend(model)).run(requests)] == references(model, requests)


needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this processor"
)


@needs_bfloat16
@pytest.mark.parametrize("family", LLAMA_SHAPED)
def test_in_bfloat16_states_are_no_further_from_those_in_float32_than_the_models_own(family):
    model, exact = (tiny_model(family.split()[0], **LLAMA_SHAPED[family]) for _ in range(2))
    exact.load_state_dict(model.bfloat16().state_dict())  # the same weights, as bfloat16 has them
    backend, ids = make_backend(model), prompt(40)
    assert isinstance(backend, FusedBackend)
    with torch.inference_mode():
        row = backend.open()
        chunks = [ids[:25], *([token] for token in ids[25:])]
        got = torch.cat([backend.feed([Segment(row, chunk)]) for chunk in chunks])
        outputs = [each(torch.tensor([ids]), output_hidden_states=True) for each in (model, exact)]
        own, want = (output.hidden_states[-1][0].float() for output in outputs)
    assert (got - want).norm() <= (own - want).norm()


@needs_bfloat16
def test_in_bfloat16_the_tokens_of_a_batch_are_those_of_each_request_alone():
    model = tiny_model().bfloat16()
    requests = list(mixed_requests(model))
    together = Decoder(FusedBackend(model), Scheduler(max_live=3, prefill_chunk=6)).run(requests)
    alone = [Decoder(FusedBackend(model)).run([request])[0] for request in requests]
    assert [s.token_ids for s in together] == [s.token_ids for s in alone]


def test_all_backends_of_a_model_share_one_copy_of_its_weights():
    model = tiny_model()
    one, two = make_backend(model), make_backend(model)
    assert one.copied is two.copied
    assert make_backend(tiny_model()).copied is not one.copied


def test_a_changed_model_is_copied_anew_and_the_copy_goes_with_its_model():
    model = tiny_model()
    before = weakref.ref(make_backend(model).copied)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    after = weakref.ref(make_backend(model).copied)
    gc.collect()
    assert before() is None and after() is not None
    del model
    gc.collect()
    assert after() is None


def _scaled_residual(model):
    model.config.residual_multiplier = 0.5
    for layer in model.model.layers:
        layer.residual_multiplier = 0.5


def _extra_part(model):
    model.model.layers[1].adapter = torch.nn.Identity()


def _other_linear(model):
    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapted(32, 32, bias=False)


def _half(model):
    model.half()


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("granite", _scaled_residual),
        ("llama", _extra_part),
        ("llama", _other_linear),
        ("llama", _half),
        ("gemma", None),
    ],
)
def test_what_is_not_exactly_that_shape_takes_the_packed_path_without_a_word(family, change):
    model = tiny_model(family)
    if change is not None:
        change(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend = make_backend(model)
    assert isinstance(backend, PackedBackend) and not isinstance(backend, FusedBackend)


def test_too_little_memory_for_a_second_copy_is_no_error(monkeypatch):
    monkeypatch.setattr("mara_integrations.engine.backends.fused.free_ram_bytes", lambda: 100)
    backend = make_backend(tiny_model())
    assert isinstance(backend, PackedBackend) and not isinstance(backend, FusedBackend)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
def test_rows_of_a_packed_linear_do_not_depend_on_how_many_there_are(dtype):
    linear, x = torch.nn.Linear(96, 160).to(dtype), torch.randn(40, 96)
    packed = PackedLinear(linear.weight, linear.bias)
    whole = packed(x)
    torch.testing.assert_close(whole, linear(x.to(dtype)).float())
    torch.testing.assert_close(packed.plus(x, whole), 2 * whole)
    for width in (1, 2, 8, 17):
        assert torch.equal(packed(x[:width]), whole[:width])


def test_positions_past_the_first_tables_are_rotated_like_the_models_own():
    model = tiny_model()
    ids = prompt(400)
    with torch.inference_mode():
        backend = FusedBackend(model)
        row = backend.open()
        got = torch.cat([backend.feed([Segment(row, ids[:100])]), backend.feed([Segment(row, ids[100:])])])
        want = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
