"""The tokenizer of a `.gguf` file whose tokens are pieces of bytes (byte-level BPE), built from what the file says.

transformers reads it by the kind of model, not by the kind of tokenizer: some of its versions read SmolLM2's as one of
another kind, and none splits the numbers of Llama 3 as published. Other kinds of tokenizers are left to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

# How a text is split before pieces are merged, by the names that llama.cpp gives to it (`tokenizer.ggml.pre`).
_GPT2 = ("gpt-2", "mpt", "olmo", "phi-2")
_SINGLE_DIGITS = ("codeshell", "command-r", "exaone", "refact", "smollm", "starcoder")
_LLAMA3 = ("dbrx", "falcon3", "llama-bpe", "llama-v3", "llama3", "pixtral", "smaug-bpe")
_QWEN2 = ("deepseek-r1-qwen", "qwen2", "stablelm2")
_WHOLE_WORDS = ("falcon3", "llama-bpe", "llama-v3", "llama3", "pixtral")  # a word that is a token is not merged
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens in a file


def byte_level_tokenizer(gguf: Path) -> Any | None:
    """Return the tokenizer of a file as its model was trained with, or None where transformers has to read it."""
    from gguf import GGUFReader

    reader = GGUFReader(str(gguf))

    def said(name: str, default: Any = None) -> Any:
        entry = reader.get_field(f"tokenizer.{name}")
        return default if entry is None else entry.contents()

    pre = said("ggml.pre")
    if said("ggml.model") != "gpt2" or pre not in _GPT2 + _SINGLE_DIGITS + _LLAMA3 + _QWEN2:
        return None
    tokens, kinds = said("ggml.tokens"), said("ggml.token_type", [])
    merges = [(left, right) for left, right in (merge.split(" ") for merge in said("ggml.merges", []))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _WHOLE_WORDS))
    if pre in _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(_splits(pre)))
    tokenizer.decoder = decoders.ByteLevel()
    for kind, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        add([AddedToken(token, normalized=False) for token, its in zip(tokens, kinds, strict=False) if its == kind])
    ids = {name: said(f"ggml.{word}_token_id") for name, word in _NAMES.items()}
    named = {name: tokens[index] for name, index in ids.items() if index is not None and index < len(tokens)}
    if said("ggml.add_bos_token", pre in _WHOLE_WORDS) and "bos_token" in named:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos_token"])]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=said("chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _splits(pre: str) -> Iterator[Any]:
    if pre in _LLAMA3 + _QWEN2:
        words = _WORDS.replace("DIGITS", r"\p{N}{1,3}" if pre in _LLAMA3 else r"\p{N}")
        yield pre_tokenizers.Split(Regex(words), "isolated")
        yield pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return
    if pre in _SINGLE_DIGITS:
        yield pre_tokenizers.Digits(individual_digits=True)
    yield pre_tokenizers.ByteLevel(add_prefix_space=False)
