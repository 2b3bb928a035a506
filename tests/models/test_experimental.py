"""What has never run on a GPU is off until it is asked for by name."""

import pytest
import torch

from mara_integrations.engine.backends.cuda_graphs import GraphedBackend
from mara_integrations.engine.backends.fused import FusedBackend
from mara_integrations.engine.backends.packed import PackedBackend
from mara_integrations.engine.backends.select import packed_kinds
from mara_integrations.errors import ConfigError
from mara_integrations.models import ranks
from mara_integrations.models.experimental import enabled_features, is_enabled
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.testing import tiny_model, tiny_tokenizer

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class Met(Exception):
    """The processes would meet now."""


@pytest.fixture
def among_two(monkeypatch):
    """This process is one of two, with a CUDA device each."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)

    def meet():
        raise Met

    monkeypatch.setattr(ranks, "join", meet)
    monkeypatch.setattr(ranks, "accelerator", lambda: "cuda")


@pytest.mark.parametrize("value", [None, "", " , "])
def test_nothing_is_on_unless_it_is_named(monkeypatch, value):
    monkeypatch.delenv("MARA_EXPERIMENTAL", raising=False)
    if value is not None:
        monkeypatch.setenv("MARA_EXPERIMENTAL", value)
    assert enabled_features() == frozenset()
    assert packed_kinds(CUDA) == (PackedBackend,)


def test_cuda_graphs_are_tried_first_where_they_are_named(monkeypatch):
    monkeypatch.setenv("MARA_EXPERIMENTAL", "gpu-tensor-parallel, cuda-graphs")
    assert is_enabled("cuda-graphs") and is_enabled("gpu-tensor-parallel")
    assert packed_kinds(CUDA) == (GraphedBackend, PackedBackend)
    assert packed_kinds(CPU) == (FusedBackend, PackedBackend)


@pytest.mark.parametrize("model", ["smollm2", "nowhere/to-be-found", (tiny_model(), tiny_tokenizer())])
def test_an_unknown_name_is_said_before_a_model_is_read(monkeypatch, model):
    monkeypatch.setenv("MARA_EXPERIMENTAL", "cuda-graphs,cuda-grafs")
    with pytest.raises(ConfigError, match=r"unknown feature, 'cuda-grafs' \(hint: .*cuda-graphs, gpu-tensor-parallel"):
        load_model(ModelSpec(model))


@pytest.mark.usefixtures("among_two")
def test_a_model_is_not_spread_over_gpus_unless_that_is_asked_for(monkeypatch):
    spec = ModelSpec("smollm2", model_kwargs={"tp_plan": "auto"})
    monkeypatch.setenv("MARA_EXPERIMENTAL", "cuda-graphs")
    with pytest.raises(ConfigError, match=r"tp_plan='auto' .* cuda devices.*MARA_EXPERIMENTAL=gpu-tensor-parallel"):
        load_model(spec)
    monkeypatch.setenv("MARA_EXPERIMENTAL", "gpu-tensor-parallel")
    with pytest.raises(Met):
        load_model(spec)


@pytest.mark.usefixtures("among_two")
def test_processes_that_compute_on_the_cpu_need_no_switch(monkeypatch):
    monkeypatch.delenv("MARA_EXPERIMENTAL", raising=False)
    monkeypatch.setattr(ranks, "accelerator", lambda: None)
    with pytest.raises(Met):
        load_model(ModelSpec("smollm2", model_kwargs={"tp_plan": "auto"}))
