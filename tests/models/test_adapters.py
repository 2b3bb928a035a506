"""LoRA adapters: merged into a copy of their base model."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from mara_integrations.errors import ModelError
from mara_integrations.models.adapters import base_of_adapter, is_adapter, load_adapted
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.testing import tiny_model, tiny_tokenizer


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def write(folder, **settings):
    folder.mkdir(exist_ok=True)
    named = {"peft_type": "LORA", "base_model_name_or_path": "base"}
    (folder / "adapter_config.json").write_text(json.dumps({**named, **settings}))
    return str(folder)


def test_an_adapter_is_a_folder_without_a_model(tmp_path, base):
    assert is_adapter(write(tmp_path / "adapter")) and not is_adapter(base) and not is_adapter("smollm2")
    assert base_of_adapter(write(tmp_path / "adapter")) == "base"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "is of the type 'PROMPT_TUNING'"),
        ({"base_model_name_or_path": None}, "names no base model"),
    ],
)
def test_what_can_not_be_merged_is_refused(tmp_path, settings, message):
    with pytest.raises(ModelError, match=message):
        base_of_adapter(write(tmp_path / "adapter", **settings))


def adapted(peft, model, base):
    """A model with an untrained adapter that changes it, as an adapter of the model in the folder `base`."""
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses what transformers will drop
        tuned = peft.get_peft_model(model, settings)
    tuned.peft_config["default"].base_model_name_or_path = base
    return tuned


def test_its_weights_are_added_to_those_of_a_copy(tmp_path, base):
    peft = pytest.importorskip("peft")
    tuned = adapted(peft, tiny_model(), base)
    ids = torch.arange(5)[None]
    with torch.inference_mode():
        wanted = tuned(ids).logits
    tuned.save_pretrained(tmp_path / "adapter")
    plain = load_model(ModelSpec(base))

    loaded = load_adapted(ModelSpec(str(tmp_path / "adapter")))

    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(ids).logits, wanted, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(plain.model(ids).logits, wanted, atol=1e-2)
    assert loaded.name == str(tmp_path / "adapter") and loaded.tokenizer is plain.tokenizer


def test_one_of_another_model_is_refused(tmp_path, base):
    peft = pytest.importorskip("peft")
    adapted(peft, tiny_model(hidden_size=64), base).save_pretrained(tmp_path / "adapter")

    with pytest.raises(ModelError, match="can't be merged into model"):
        load_adapted(ModelSpec(str(tmp_path / "adapter")))
