"""What each family of transformers gets at load: the packed path, the serial one with a reason, or a refusal."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from decoding import reference
from packaging.version import Version

from mara_integrations.engine.backends import select as backends
from mara_integrations.engine.backends.packed import PackedBackend
from mara_integrations.engine.backends.select import make_backend
from mara_integrations.engine.backends.serial import SerialBackend
from mara_integrations.engine.backends.windows import has_windows, narrowed
from mara_integrations.engine.decoder import Decoder
from mara_integrations.engine.request import Request
from mara_integrations.errors import ModelError
from mara_integrations.sampling import SamplingParams
from mara_integrations.testing import random_head, tiny_model

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"sliding_window": 6}
EVERY_FOURTH_SEES_ALL = {**WINDOW, "num_hidden_layers": 5}
MIXED_HEAD_SIZES = {  # queries and keys of width 12, values of width 6
    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6, "head_dim": 4,
    "num_key_value_heads": 4, "q_lora_rank": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
SOFT_CAPS = {**WINDOW, "query_pre_attn_scalar": 8}
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}

PACKED = {
    "apertus": {}, "arcee": {}, "cohere2": EVERY_FOURTH_SEES_ALL,
    "deepseek_v2": {**MIXED_HEAD_SIZES, "q_lora_rank": None},
    "deepseek_v3": MIXED_HEAD_SIZES, "ernie4_5": {}, "exaone4": EVERY_FOURTH_SEES_ALL, "gemma2": SOFT_CAPS,
    "gemma3_text": {**SOFT_CAPS, "num_hidden_layers": 7}, "glm4": {}, "gpt_bigcode": {}, "gpt_neox": {},
    "gptj": {"rotary_dim": 4},
    "gpt_oss": {**WINDOW, **EXPERTS, **PLAIN_ROPE},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3}, "granitemoe": EXPERTS, "hunyuan_v1_dense": {},
    "minicpm3": MIXED_HEAD_SIZES, "ministral": WINDOW, "mistral": WINDOW, "mixtral": EXPERTS, "olmo2": {},
    "olmo3": EVERY_FOURTH_SEES_ALL, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "phi": {}, "phi3": WINDOW,
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 0},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, "seed_oss": {},
    "smollm3": {}, "starcoder2": WINDOW, "vaultgemma": SOFT_CAPS,
}  # fmt: skip
SERIAL = {
    "bloom": ({}, "its attention can't be replaced"),  # positions from the mask
    "falcon": ({"alibi": True}, "its attention can't be replaced"),
    "gpt_neo": ({"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6},
                "its attention can't be replaced"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "hidden states differ from a plain forward"),
    "llama4_text": ({"attention_chunk_size": 64, "num_local_experts": 2, "intermediate_size_mlp": 64},
                    "its windows are not those of packed attention"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "its attention can't be replaced"),
    "nemotron": ({}, "its layers do not ask for an attention function"),
    "phi3": ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
                                  "long_factor": [2.0] * 4, "original_max_position_embeddings": 256}},
             "its position encoding depends on the longest sequence"),
    "qwen3_next": ({"num_hidden_layers": 4, **LINEAR, "num_experts": 4, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
                   "its attention can't be replaced"),
}  # fmt: skip
REFUSED = {
    "mamba": ({"state_size": 4}, "can't be decoded exactly: hidden states differ"),
    "rwkv": ({"attention_hidden_size": 32}, "can't be decoded exactly: hidden states differ"),
}
SINCE = {  # this version of transformers; older ones refuse the family, know nothing of it, or run it serially
    "gpt_bigcode": "5.23", "gptj": "5.24", "lfm2": "5.16", "minicpm3": "5.16", "nemotron": "5.16", "qwen3_next": "5.9",
}  # fmt: skip
DECODED = ("deepseek_v3", "gptj", "minicpm3", "olmo3", "phi3", "qwen2", "starcoder2", "vaultgemma")


def settled(families):
    return [family for family in families if Version(transformers.__version__) >= Version(SINCE.get(family, "5.0"))]


def assert_decodes(model, backend):
    """Long enough to leave every window behind."""
    prompt = torch.randint(1, 256, (9,), generator=torch.Generator().manual_seed(0)).tolist()
    head = random_head(32, "residual", seed=1)
    request = Request(prompt, SamplingParams(max_new_tokens=4, top_k=5), head=head)
    want = reference(model, prompt, head, request.sampling)
    assert Decoder(backend).run([request])[0].token_ids == want


@pytest.mark.parametrize("family", settled(PACKED))
def test_a_family_runs_packed_without_a_warning(family):
    model = tiny_model(family, **PACKED[family])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend = make_backend(model)
    assert isinstance(backend, PackedBackend)
    if family in DECODED:
        assert_decodes(model, backend)


@pytest.mark.parametrize("family", settled(SERIAL))
@pytest.mark.filterwarnings("ignore:.*falling back to its reference")
def test_a_family_without_trees_takes_the_serial_path_and_says_why(family):
    config, reason = SERIAL[family]
    model = tiny_model(family, **config)
    with pytest.warns(UserWarning, match=f"serial path: {reason}"):
        backend = make_backend(model)
    assert isinstance(backend, SerialBackend)
    assert not str(model.config._attn_implementation).startswith("mara_"), "its own attention was given back"
    assert_decodes(model, backend)


@pytest.mark.parametrize("family", REFUSED)
@pytest.mark.filterwarnings("ignore:.*serial path")
def test_a_model_that_is_not_decoded_exactly_is_refused_with_a_reason(family):
    config, reason = REFUSED[family]
    with pytest.raises(ModelError, match=reason):
        make_backend(tiny_model(family, **config))


@pytest.mark.parametrize("family", SINCE)
@pytest.mark.filterwarnings("ignore:.*serial path", "ignore:.*falling back to its reference")
def test_whatever_a_version_of_transformers_makes_of_a_family_it_is_decoded_exactly_or_refused(family):
    config = PACKED[family] if family in PACKED else SERIAL[family][0]
    if family not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} knows no {family}")
    model = tiny_model(family, **config)
    try:
        backend = make_backend(model)
    except ModelError as error:
        assert "can't be decoded exactly: " in str(error) and transformers.__version__ in error.hint
    else:
        assert_decodes(model, backend)


def test_chunks_longer_than_the_probe_would_have_gone_unseen():
    config, _ = SERIAL["llama4_text"]
    model = tiny_model("llama4_text", **config)
    assert backends.probed(PackedBackend, model)[1] == "", "on nine tokens both look alike"
    with narrowed(model):
        assert "differ" in backends.probed(PackedBackend, model)[1]


def test_narrowed_windows_are_given_back():
    model = tiny_model("gemma3_text", **PACKED["gemma3_text"])
    attention = [layer.self_attn for layer in model.model.layers]
    before = [layer.sliding_window for layer in attention]
    assert has_windows(model) and not has_windows(tiny_model())
    with pytest.raises(KeyError), narrowed(model):
        assert [layer.sliding_window for layer in attention] == [3 if window else None for window in before]
        assert model.config.sliding_window == 3
        raise KeyError
    assert [layer.sliding_window for layer in attention] == before and model.config.sliding_window == 6
