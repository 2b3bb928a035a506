"""What `engine="auto"` stands for: one rule, as a table."""

from __future__ import annotations

import pytest
import torch

from mara_integrations.engine.choose_engine import EngineChoice, Machine, choose_engine, is_gguf_file
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.testing import tiny_model, tiny_tokenizer

LAPTOP = Machine()
WITHOUT = Machine(no_llama_cpp="llama.cpp is not installed")
CUDA, CUDA_UNUSED = Machine("cuda", has_gpu_offload=True), Machine("cuda")
MAC, VULKAN = Machine("mps", has_gpu_offload=True), Machine(has_gpu_offload=True)
LLAMA_CPP, TRANSFORMERS = "llama.cpp", "transformers"

CASES = {
    "a file": ({}, None, LAPTOP, LLAMA_CPP, "own quantisation"),
    "llama.cpp is absent": ({}, None, WITHOUT, TRANSFORMERS, "not installed"),
    "its library is broken": ({}, None, Machine(no_llama_cpp="an unknown layout"), TRANSFORMERS, "an unknown layout"),
    "it has the GPU": ({}, None, CUDA, LLAMA_CPP, "own quantisation"),
    "it has the GPU of a Mac": ({}, None, MAC, LLAMA_CPP, "own quantisation"),
    "it has a GPU that torch does not see": ({}, None, VULKAN, LLAMA_CPP, "own quantisation"),
    "it would leave a GPU unused": ({}, None, CUDA_UNUSED, TRANSFORMERS, "no GPU support, and there is cuda"),
    "the GPU is not wanted": ({"device": "cpu"}, None, CUDA_UNUSED, LLAMA_CPP, "own quantisation"),
    "a GPU is named": ({"device": "cuda"}, None, CUDA, LLAMA_CPP, "own quantisation"),
    "a GPU is named that it has not": ({"device": torch.device("cuda")}, None, CUDA_UNUSED, TRANSFORMERS, "cuda"),
    "one of several GPUs": ({"device": "cuda:1"}, None, CUDA, TRANSFORMERS, "device='cuda:1'"),
    "a number format": ({"dtype": "float32"}, None, LAPTOP, TRANSFORMERS, "dtype='float32'"),
    "a number format of torch": ({"dtype": torch.bfloat16}, None, LAPTOP, TRANSFORMERS, "dtype='torch.bfloat16'"),
    "int8": ({"quantization": "int8"}, None, LAPTOP, TRANSFORMERS, "quantization='int8'"),
    "a revision": ({"revision": "main"}, None, LAPTOP, TRANSFORMERS, "revision='main'"),
    "a device map": ({"model_kwargs": {"device_map": "auto"}}, None, LAPTOP, TRANSFORMERS, "device_map in model_kw"),
    "tensor parallel": ({"model_kwargs": {"tp_plan": "auto"}}, None, LAPTOP, TRANSFORMERS, "tp_plan in model_kwargs"),
    "of both": ({"model_kwargs": {"n_ctx": 99, "tp_plan": "auto"}}, None, LAPTOP, TRANSFORMERS, "tp_plan"),
    "of llama.cpp": ({"model_kwargs": {"n_ctx": 99}}, None, CUDA_UNUSED, LLAMA_CPP, "n_ctx in model_kwargs"),
    "of llama.cpp, absent": ({"model_kwargs": {"n_ctx": 99}}, None, WITHOUT, LLAMA_CPP, "n_ctx in model_kwargs"),
    "as many replies as it can": ({}, EngineLimits(max_live=115), LAPTOP, LLAMA_CPP, "own quantisation"),
    "more replies than it can": ({}, EngineLimits(max_live=116), LAPTOP, TRANSFORMERS, "max_live=116"),
    "transformers is named": ({"engine": TRANSFORMERS}, None, LAPTOP, TRANSFORMERS, "engine='transformers' is set"),
    "llama.cpp is named": ({"engine": LLAMA_CPP}, None, CUDA_UNUSED, LLAMA_CPP, "engine='llama.cpp' is set"),
    "the embedded model": ({"model": "smollm2"}, None, LAPTOP, TRANSFORMERS, "not named as a .gguf file"),
    "a model of the Hub": ({"model": "org/model"}, None, LAPTOP, TRANSFORMERS, "not named as a .gguf file"),
    "a file that is absent": ({"model": "no-such.gguf"}, None, LAPTOP, TRANSFORMERS, "not named as a .gguf file"),
    "vLLM is named": ({"model": "org/model", "engine": "vllm"}, None, LAPTOP, "vllm", "engine='vllm' is set"),
}


@pytest.mark.parametrize("settings, limits, machine, name, reason", CASES.values(), ids=CASES)
def test_what_runs_a_model(tmp_path, settings, limits, machine, name, reason):
    (tmp_path / "model.gguf").touch()

    choice = choose_engine(ModelSpec(**{"model": tmp_path / "model.gguf", **settings}), limits, lambda: machine)

    assert choice.name == name and reason in choice.reason


def test_a_loaded_model_stays_on_its_engine():
    objects = tiny_model(), tiny_tokenizer()

    assert choose_engine(ModelSpec(objects)).name == TRANSFORMERS
    assert choose_engine(ModelSpec(load_model(ModelSpec(objects)))) == EngineChoice(
        TRANSFORMERS, "the model is loaded already"
    )


def test_the_machine_is_asked_only_where_it_decides(tmp_path):
    def never():
        raise AssertionError("the library was loaded")

    (tmp_path / "model.gguf").touch()
    specs = [ModelSpec("smollm2"), ModelSpec(tmp_path / "model.gguf", dtype="float32")]
    assert {choose_engine(spec, machine=never).name for spec in specs} == {TRANSFORMERS}


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "file.gguf").touch()

    assert is_gguf_file(str(tmp_path / "file.gguf")) and not is_gguf_file(tmp_path / "folder.gguf")
