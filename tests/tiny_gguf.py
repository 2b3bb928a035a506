"""A tiny model with random weights as a `.gguf` file, and the same model in transformers as its oracle."""

from __future__ import annotations

import gguf
import numpy as np

from mara_integrations.testing import tiny_model, tiny_tokenizer

VOCAB_SIZE = 257  # the bytes, the end, and one pair: llama.cpp wants a merge
_PAIR = "ab"
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def oracle(**config):
    """The model in transformers."""
    return tiny_model(vocab_size=VOCAB_SIZE, eos_token_id=0, bos_token_id=0, rms_norm_eps=1e-5, **config)


def write_gguf(path, model=None, *, kind=gguf.GGMLQuantizationType.F32, **numbers):
    """Write a model of Llama's kind, `oracle()` if none is given, in float32 or a quantisation; returns the path.

    `numbers` are further entries of its metadata, such as `logit_scale`.
    """
    model = model or oracle()
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, number in numbers.items():
        writer.add_float32(f"llama.{name}", number)
    _add_tokenizer(writer)
    for name, weight in model.state_dict().items():
        values = weight.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = permuted(values, values.shape[0] // config.head_dim)
        stored = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(file_name(name), gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer):
    tokenizer = tiny_tokenizer()
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, _PAIR])
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * len(tokens)])
    writer.add_token_merges([" ".join(_PAIR)])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def file_name(name):
    """The name in a file of a weight of Llama's kind."""
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, part = name.split(".", 3)
    part, suffix = part.rsplit(".", 1)
    return f"blk.{layer}.{_NAMES[part]}.{suffix}"


def permuted(weights, num_heads):
    """Rotary halves side by side, as llama.cpp has them for this kind of models."""
    size = weights.shape[0] // num_heads // 2
    return np.ascontiguousarray(weights.reshape(num_heads, 2, size, -1).swapaxes(1, 2).reshape(weights.shape))
