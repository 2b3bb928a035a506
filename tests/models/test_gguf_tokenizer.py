"""Tokenizers of `.gguf` files: texts are split as llama.cpp splits them, whatever the version of transformers."""

from __future__ import annotations

import gguf
import pytest
from transformers import AutoTokenizer

from mara_integrations.models.gguf import tokenizer_of
from mara_integrations.models.gguf_tokenizer import byte_level_tokenizer
from mara_integrations.testing import tiny_tokenizer

BYTES = sorted(tiny_tokenizer().get_vocab(), key=tiny_tokenizer().get_vocab().__getitem__)
MERGES = ("1 2", "12 3", "123 4", "a b", "Ġ a")
BOS, EOS, TOOL = "<|begin|>", "<|end|>", "<tool>"
PIECES = [merge.replace(" ", "") for merge in MERGES]


@pytest.fixture
def write(tmp_path):
    def write(pre, *, model="gpt2", **entries):
        tokens = [*BYTES, *PIECES, "abab", BOS, EOS, TOOL]
        kinds = [gguf.TokenType.NORMAL] * len(tokens)
        kinds[-3:] = [gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED]
        path = tmp_path / f"{pre}.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(list(MERGES))
        writer.add_bos_token_id(tokens.index(BOS))
        writer.add_eos_token_id(tokens.index(EOS))
        writer.add_chat_template("{{ messages[0].content }}")
        if "add_bos" in entries:
            writer.add_add_bos_token(entries["add_bos"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path

    return write


def pieces(tokenizer, text, **settings):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, **settings)["input_ids"])


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["1234", "Ġa"]),
        ("smollm", ["1", "2", "3", "4", "Ġa"]),
        ("qwen2", ["1", "2", "3", "4", "Ġa"]),
        ("llama-bpe", ["123", "4", "Ġa"]),
    ],
)
def test_numbers_are_split_as_the_file_says(write, pre, expected):
    assert pieces(tokenizer_of(write(pre)), "1234 a", add_special_tokens=False) == expected


def test_a_word_that_is_a_token_is_not_merged_where_its_model_was_trained_so(write):
    assert pieces(tokenizer_of(write("llama-bpe")), "abab", add_special_tokens=False) == ["abab"]
    assert pieces(tokenizer_of(write("dbrx")), "abab", add_special_tokens=False) == ["ab", "ab"]


def test_accents_are_composed_where_its_model_was_trained_so(write):
    decomposed = "e\N{COMBINING ACUTE ACCENT}"
    assert pieces(tokenizer_of(write("qwen2")), decomposed) == ["Ã", "©"]
    assert pieces(tokenizer_of(write("gpt-2")), decomposed) == ["e", "Ì", "ģ"]


@pytest.mark.parametrize(
    ("pre", "entries", "begins"),
    [
        ("llama-bpe", {}, True),
        ("llama-bpe", {"add_bos": False}, False),
        ("gpt-2", {}, False),
        ("gpt-2", {"add_bos": True}, True),
    ],
)
def test_the_first_token_is_as_the_file_says(write, pre, entries, begins):
    assert pieces(tokenizer_of(write(pre, **entries)), "a") == [BOS, "a"][not begins :]


def test_control_tokens_are_special_and_those_of_users_are_not(write):
    tokenizer = tokenizer_of(write("smollm"))
    ids = tokenizer(f"a{TOOL}b{EOS}")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", TOOL, "b", EOS]
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"a{TOOL}b"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, None)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("text", ["", " ", " a  b\n\n1. x", "don't I'LL", "日本語 🎉", "a\r\n\r\n\tb 12345"])
def test_what_is_read_is_written_and_a_saved_copy_reads_the_same(write, pre, text, tmp_path):
    tokenizer = tokenizer_of(write(pre))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert tokenizer.decode(ids) == copy.decode(ids) == text
    assert copy(text, add_special_tokens=False)["input_ids"] == ids


@pytest.mark.parametrize(("pre", "model"), [("of-tomorrow", "gpt2"), ("default", "llama")])
def test_other_kinds_are_left_to_transformers(write, pre, model):
    assert byte_level_tokenizer(write(pre, model=model)) is None
