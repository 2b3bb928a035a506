"""Models with quantised weights: decoded packed, to the tokens of their own `generate`, and trained on."""

import importlib.util
import json

import pytest
import torch

from mara_integrations.engine.backends.fused import FusedBackend
from mara_integrations.engine.backends.packed import PackedBackend
from mara_integrations.runtime import MARAEngine, worker_for
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.run import train

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, which we do not choose
FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
EIGHT_BITS = {"quant_method": "bitsandbytes", "load_in_8bit": True}
INT8_WEIGHTS = {
    "quant_method": "torchao",
    "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}},
}
INT8_STATES = {
    "quant_method": "torchao",
    "quant_type": {"default": {"_type": "Int8DynamicActivationInt8WeightConfig", "_version": 2, "_data": {}}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as wide as the blocks that weights are quantised in."""
    folder = tmp_path_factory.mktemp("quantised")
    model = tiny_model(eos_token_id=0, hidden_size=64, head_dim=16, intermediate_size=128)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return folder


def quantised(folder, settings, head=None):
    if importlib.util.find_spec(settings["quant_method"]) is None:
        pytest.skip(f"{settings['quant_method']} is not installed")
    return MARAEngine(str(folder / "model"), head, model_kwargs={"quantization_config": settings})


@pytest.mark.parametrize("settings", [FOUR_BITS, INT8_WEIGHTS], ids=["bitsandbytes-4", "torchao-8"])
def test_weights_of_few_bits_are_decoded_packed_to_the_tokens_of_generate(folder, settings):
    engine = quantised(folder, settings)
    prompt = engine.encode("Say what you will: ")

    backend = worker_for(engine.model).decoder.backend
    tokens = engine.generate(prompt, max_new_tokens=16).token_ids

    assert isinstance(backend, PackedBackend) and not isinstance(backend, FusedBackend)
    ids = torch.tensor([prompt])
    model = engine.model.model
    want = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
    assert list(tokens) == want[0, len(prompt) :].tolist()[: len(tokens)]
    assert engine.verify(prompt, head=random_head(64), max_new_tokens=16).disagreement is None


@pytest.mark.parametrize("settings", [EIGHT_BITS, INT8_STATES], ids=["bitsandbytes-8", "torchao-8-states"])
def test_layers_that_round_states_are_decoded_packed_as_exactly_as_they_are(folder, settings):
    engine = quantised(folder, settings, random_head(64))

    assert isinstance(worker_for(engine.model).decoder.backend, PackedBackend)
    assert engine.verify("Say what you will: ", max_new_tokens=16).holds


def test_a_head_is_trained_on_a_quantised_model(folder):
    quantised(folder, FOUR_BITS)
    pairs = [{"prompt": f"Say {n}", "chosen": "yes yes, good", "rejected": "no no, bad"} for n in range(16)]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))

    result = train(
        TrainConfig.of(
            model=str(folder / "model"), model_kwargs={"quantization_config": FOUR_BITS}, data=folder / "pairs.jsonl",
            output=folder / "head", max_reply_tokens=8, inner_size=16, epochs=2, eval_prompts=2,
        )
    )  # fmt: skip

    assert result.held_out_accuracy is not None
    assert (folder / "head" / "head.safetensors").exists()
