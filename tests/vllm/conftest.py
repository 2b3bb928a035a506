"""One server of vLLM's for all tests, in this process, on a tiny model with a folder of heads."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer

# This folder is found as `vllm` too, where the package is absent, but as a namespace, which has no origin.
has_vllm = (spec := find_spec("vllm")) is not None and spec.origin is not None
WIDTH = 64  # heads of 32 dimensions: vLLM's attention on a CPU has none below


def save_model(folder):
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 128}
    model = tiny_model(hidden_size=WIDTH, max_position_embeddings=2048, **sizes)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def save_heads(folder):
    heads = {f"q{i}": random_head(WIDTH, "q", seed=i, top_k=8, scale=4.0) for i in range(3)}
    heads["wide"] = random_head(WIDTH, "q", seed=5, top_k=8, scale=4.0, inner_sizes=(48, 8))
    others = {"afterstate": random_head(WIDTH, "residual"), "narrow": random_head(48, "q")}
    for name, head in {**heads, **others}.items():
        head.save_pretrained(folder / name)
    return heads


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """A base model on disk and in transformers, and heads on disk and in memory."""
    root = tmp_path_factory.mktemp("served")
    return root, save_model(root / "tiny"), save_heads(root / "heads")


@pytest.fixture(scope="session")
def environment(served):
    """What vLLM is told, in this process and those it starts."""
    if not has_vllm:
        pytest.skip("vLLM is not installed")
    root, *_ = served
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARA_HEADS", str(root / "heads"))
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        yield patch


@pytest.fixture(scope="session")
def llm(served, environment):
    import vllm

    return vllm.LLM(str(served[0] / "tiny"), dtype="float32", enforce_eager=True, max_model_len=256)
