"""What every engine must do, on one tiny `.gguf` file; and what each of them refuses."""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mara_integrations import MARALLM, ChatMARA
from mara_integrations.engine.choose_engine import log_choice
from mara_integrations.errors import (
    ConfigError,
    ContextLengthError,
    MissingExtraError,
    ModelError,
    UnsupportedModelError,
)
from mara_integrations.fingerprints import same_model
from mara_integrations.messages import Message
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.replies.forms import ReplyForm
from mara_integrations.runtime import MARAEngine, backend_of, worker_for
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer

if not any(map(find_spec, ("llama_cpp", "xllamacpp"))):
    pytest.skip("llama.cpp is not installed", allow_module_level=True)

from tiny_gguf import VOCAB_SIZE, oracle, write_gguf
from waiting import eventually

HEADS = {
    "base": None,
    "q": random_head(32, "q"),
    "residual": random_head(32, "residual"),
    "paper": random_head(32, "paper"),
    "both": {random_head(32, "q"): 1.0, random_head(32, "value", seed=1): 0.5},
}
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["pun", "riddle"]}, "rating": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["kind", "rating"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("MARA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    yield str(write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", oracle(max_position_embeddings=2048)))
    patch.undo()


def make(path, engine, **settings):
    settings = {"max_new_tokens": 12, "seed": 0, **settings}
    # What flash attention computes depends, in the third decimal, on what is decoded together.
    exact = {"flash_attn": False, "type_k": "f32", "type_v": "f32"}
    kwargs = {"n_threads": 1, "n_ctx": 1024, **exact} if engine == "llama.cpp" else {}
    return MARAEngine(path, engine=engine, model_kwargs=kwargs, **settings)


@pytest.fixture(scope="module", params=["llama.cpp", "transformers"])
def engine(path, request):
    return make(path, request.param)


@pytest.fixture(scope="module")
def both(path):
    return [make(path, name) for name in ("llama.cpp", "transformers")]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_head_of_strength_0_is_the_base_model(engine, temperature):
    base = engine.generate("hi", head=None, temperature=temperature)
    for head in HEADS.values():
        assert engine.generate("hi", head=head, strength=0, temperature=temperature).token_ids == base.token_ids


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replies_are_the_references(engine, name, temperature):
    assert engine.verify("what is it?", head=HEADS[name], temperature=temperature).holds


def test_a_head_says_the_same_on_both_engines(both):
    for head in HEADS.values():
        for prompt in ("tell me", "who?", "a story"):
            ours, theirs = (engine.generate(prompt, head=head, trace=True) for engine in both)
            assert ours.token_ids == theirs.token_ids
            assert ours.trace[0].log_probs[:5] == pytest.approx(theirs.trace[0].log_probs[:5], abs=1e-4)
            assert ours.trace[0].accept_logits[:1] == pytest.approx(theirs.trace[0].accept_logits[:1], abs=1e-3)
            assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-4)


def test_llama_cpp_replies_without_the_code_of_transformers_models(path):
    reply = make(path, "llama.cpp", temperature=0).generate("hi")  # what is read of the file once is kept
    code = """
import sys
from mara_integrations import MARAEngine
engine = MARAEngine(sys.argv[1], engine="llama.cpp", model_kwargs={"n_threads": 1}, max_new_tokens=12)
print(*engine.generate("hi", temperature=0).token_ids)
assert "transformers.modeling_utils" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True, text=True)
    assert run.stdout.split() == [str(token_id) for token_id in reply.token_ids]


@pytest.mark.parametrize("name", ["f32", "f16"])
def test_keys_and_values_are_held_in_the_format_that_is_set(path, name):
    kwargs = {"n_threads": 1, "n_ctx": 256, "type_k": name, "type_v": name}
    engine = MARAEngine(path, engine="llama.cpp", model_kwargs=kwargs, max_new_tokens=4)
    config = oracle().config
    num_numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert engine.model.model.cell_bytes == num_numbers * {"f32": 4, "f16": 2}[name]
    assert len(engine.generate("hi", temperature=0).token_ids) == 4


def test_a_format_that_does_not_suit_the_model_is_refused(path):
    engine = MARAEngine(path, engine="llama.cpp", model_kwargs={"n_ctx": 256, "type_k": "q8_0"})
    with pytest.raises(ModelError, match="q8_0 with block size 32 does not divide") as refused:
        engine.generate("hi")
    assert "type_k" in str(refused.value.hint)


def test_a_seed_says_which_draw(engine):
    def draw(seed):
        return engine.generate("hi", head=HEADS["q"], temperature=1.0, seed=seed).token_ids

    assert draw(3) == draw(3) != draw(4)


@pytest.mark.parametrize("name", HEADS)
def test_a_batch_has_the_replies_of_one_by_one(engine, name):
    prompts = ["hi", "a longer prompt than the others have", "what?", "and one more"]
    together = engine.generate_batch(prompts, head=HEADS[name])
    assert [reply.token_ids for reply in together] == [engine.generate(p, head=HEADS[name]).token_ids for p in prompts]


def test_heads_of_many_requests_are_decoded_together(engine):
    requests = [engine.request("hi", head=head, temperature=1.0) for head in HEADS.values()]
    alone = [engine.generate(request).token_ids for request in requests]
    streams = [engine.stream(engine.request("hi", head=head, temperature=1.0)) for head in HEADS.values()]
    together = [[*stream][-1].generation.token_ids for stream in streams]
    assert together == alone


def test_a_stream_has_the_reply_in_pieces(engine):
    whole = engine.generate("hi", head=HEADS["q"])
    updates = [*engine.stream("hi", head=HEADS["q"])]
    assert "".join(update.text for update in updates) == whole.text
    assert sum((update.token_ids for update in updates), ()) == whole.token_ids and len(updates) > 5


def test_a_stop_string_ends_a_reply(engine):
    text = engine.generate("hi").text
    assert engine.generate("hi", stop=[text[3:5]]).text == text[: text.index(text[3:5])]


def test_a_grammar_holds_the_reply(engine):
    reply = engine.generate("hi", head=HEADS["q"], form=ReplyForm(json_schema=SCHEMA), max_new_tokens=80)
    assert json.loads(reply.text)["kind"] in ("pun", "riddle") and reply.finish_reason == "stop"


def test_a_dropped_stream_leaves_no_sequence(path):
    engine = make(path, "llama.cpp", max_new_tokens=900)
    stream = engine.stream("hi", head=HEADS["residual"])
    next(stream)
    stream.close()
    decoder = worker_for(engine.model).decoder

    def holds_nothing():
        if not decoder.is_idle:
            return False
        decoder.prefixes.clear()
        gc.collect()
        return decoder.backend.num_sequences == 0

    eventually(holds_nothing)


def test_a_shared_beginning_is_read_once(path):
    engine = make(path, "llama.cpp")
    system = Message("system", "be brief and kind, and say what you know, and no more than that")
    replies = [engine.generate([system, Message("user", text)]) for text in ("hi", "who?", "hi")]
    prefixes, asked = worker_for(engine.model).decoder.prefixes, engine.encode([system, Message("user", "why?")])
    eventually(lambda: prefixes.longest(asked)[1] > 60)
    assert replies[0].token_ids == replies[2].token_ids


def test_the_model_is_known_to_be_the_same(both):
    ours, theirs = (engine.model for engine in both)
    assert same_model(ours.fingerprint, theirs.fingerprint) and ours.fingerprint == theirs.fingerprint
    assert ours.eos_token_ids == theirs.eos_token_ids and ours.vocab_size == theirs.vocab_size == VOCAB_SIZE
    assert both[0].encode("hi there, 12") == both[1].encode("hi there, 12")
    assert ours.number_format == "F32"


def test_a_head_is_known_to_be_of_the_model_or_of_another(both, path):
    of_this = both[1].model.fingerprint
    of_another = load_model(ModelSpec((oracle(seed=1), tiny_tokenizer()))).fingerprint
    own, other = (
        random_head(32, "q", base_model="org/named", base_model_fingerprint=known) for known in (of_this, of_another)
    )
    make(path, "llama.cpp", head=own).load()  # without a warning
    with pytest.warns(UserWarning, match="org/named"):
        make(path, "llama.cpp", head=other).load()


def test_llms_of_both_frameworks_run_on_it(path):
    settings = {"engine": "llama.cpp", "head": HEADS["q"], "max_tokens": 8, "model_kwargs": {"n_threads": 1}}
    llm, chat = MARALLM(path, **settings), ChatMARA(path, **settings)
    text = llm.engine.generate("hi").text
    assert llm.complete("hi").text == llm.invoke("hi").content == chat.invoke("hi").content == text
    assert "".join(chunk.content for chunk in chat.stream("hi")) == text
    assert llm.engine.model is chat.engine.model and llm.engine.model.engine == "llama.cpp"
    assert llm.model_copy().engine_name == "llama.cpp"


def test_the_command_line_takes_it(path):
    from mara_integrations.cli import app

    asked = ["generate", "hi", "--model", path, "--engine", "llama.cpp", "--max-new-tokens", "6", "--no-stream"]
    result = CliRunner().invoke(app, [*asked, "--model-kwargs", "n_threads=1"])
    want = MARAEngine(path, engine="llama.cpp", model_kwargs={"n_threads": 1}, max_new_tokens=6).generate("hi").text
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == want.strip()


def test_what_the_engines_differ_by_is_measured(both):
    found = both[0].compare(both[1], "hi")
    assert 0 < found.states < 0.01 and found.log_probs < 0.05 and found.same_best > 0.9


def test_a_quantised_file_runs_as_it_is(tmp_path, monkeypatch):
    from gguf import GGMLQuantizationType

    monkeypatch.setenv("MARA_CACHE_DIR", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "q8.gguf", kind=GGMLQuantizationType.Q8_0)
    engine = MARAEngine(str(file), engine="llama.cpp", model_kwargs={"n_threads": 1}, max_new_tokens=8)
    assert engine.model.number_format == "Q8_0"
    assert engine.verify("hi", head=HEADS["q"]).holds
    exact, ids = oracle().get_output_embeddings().weight, torch.tensor([3, 200])
    assert torch.allclose(engine.model.model.output_embeddings(ids), exact[ids], atol=0.02)
    assert not any(entry.name.endswith(".safetensors") for entry in (tmp_path / "cache").rglob("*"))


REFUSED = {
    "dtype": ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
    "quantization": ({"quantization": "int8"}, "quantization='int8'"),
    "revision": ({"revision": "main"}, "revision='main'"),
    "a loaded model": ({"model": (object(), object())}, "loaded already"),
    "an argument of transformers": ({"model_kwargs": {"device_map": "auto"}}, "device_map"),
    "no tokens": ({"model_kwargs": {"n_ctx": 0}}, "n_ctx=0"),
    "another engine": ({"engine": "llamacpp"}, "engine='llamacpp'"),
}


@pytest.mark.parametrize("settings, said", REFUSED.values(), ids=REFUSED)
def test_what_it_can_not_do_is_refused_by_name(settings, said):
    with pytest.raises(ConfigError, match=said):
        MARAEngine(**{"model": "no-such-file.gguf", "engine": "llama.cpp", **settings})


def test_a_folder_is_no_gguf(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"runs .gguf files"):
        MARAEngine(str(tmp_path), engine="llama.cpp").load()


@pytest.mark.parametrize("kwargs", [{"n_gpu_layers": 3}, {"device": "cuda"}])
def test_layers_on_a_gpu_that_is_not_there_are_refused(path, kwargs):
    from mara_integrations.models.llama_cpp.library import library

    if library().llama_supports_gpu_offload():
        pytest.skip("this llama.cpp has a GPU")
    device = kwargs.pop("device", "auto")
    with pytest.raises(ConfigError, match="GPU"):
        MARAEngine(path, engine="llama.cpp", device=device, model_kwargs=kwargs).load()


def test_a_window_wider_than_the_models_is_refused(path):
    with pytest.raises(ConfigError, match=r"n_ctx=4096 .* 2048"):
        MARAEngine(path, engine="llama.cpp", model_kwargs={"n_ctx": 4096}).load()


def test_a_prompt_that_is_too_long_is_refused(path):
    engine = MARAEngine(path, engine="llama.cpp", model_kwargs={"n_ctx": 256, "n_threads": 1})
    with pytest.raises(ContextLengthError, match="256"):
        engine.generate("long " * 100)


@pytest.mark.parametrize("content", [b"GGUF damaged", b""])
def test_a_broken_file_is_named(tmp_path, monkeypatch, content):
    monkeypatch.setenv("MARA_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"bad.gguf"):
        MARAEngine(str(tmp_path / "bad.gguf"), engine="llama.cpp").load()


def test_a_cut_file_is_named(path, tmp_path, monkeypatch):
    monkeypatch.setenv("MARA_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cut.gguf").write_bytes(Path(path).read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"cut.gguf"):
        MARAEngine(str(tmp_path / "cut.gguf"), engine="llama.cpp").load()


def test_without_the_package_its_extra_is_named(path, monkeypatch):
    from mara_integrations.models.llama_cpp import library

    monkeypatch.setattr(library, "PACKAGES", ())
    library.library.cache_clear()
    with pytest.raises(MissingExtraError, match="llama-cpp"):
        MARAEngine(path, engine="llama.cpp", model_kwargs={"n_ctx": 100}).load()
    library.library.cache_clear()


def test_an_unknown_layout_is_an_error_and_no_crash():
    from mara_integrations.models.llama_cpp import library

    params = library.library().llama_context_default_params()
    if not isinstance(params, library.ContextParams):
        pytest.skip("llama-cpp-python declares its own")
    params.n_batch = 77
    with pytest.raises(ModelError, match="n_batch=77"):
        library.check_layout(params, library.CONTEXT_DEFAULTS, "a package")


def test_what_llama_cpp_says_is_heard_by_who_asks(path, caplog):
    with caplog.at_level(logging.WARNING):
        MARAEngine(path, engine="llama.cpp", model_kwargs={"n_ctx": 300, "n_threads": 1}).load()
    assert not [record for record in caplog.records if "llama" in record.name]


# --- what `auto` takes


def test_auto_takes_it_for_a_file_in_both_frameworks(path, caplog):
    settings = {"head": HEADS["q"], "max_tokens": 8}
    log_choice.cache_clear()  # it is said once in a process
    with caplog.at_level(logging.INFO, "mara_integrations"):
        llm, chat = MARALLM(path, **settings), ChatMARA(path, **settings)
        assert not llm.engine.is_loaded and llm.engine.runs_on.name == "llama.cpp"
        text = llm.complete("hi").text

    assert llm.invoke("hi").content == chat.invoke("hi").content == text
    assert text == make(path, "llama.cpp", max_new_tokens=8).generate("hi", head=HEADS["q"]).text
    assert llm.engine.model is chat.engine.model and llm.engine.model.engine == "llama.cpp"
    said = [record.getMessage() for record in caplog.records if "runs on" in record.getMessage()]
    assert said == [f"{path} runs on llama.cpp: it runs the .gguf file in its own quantisation"]


def test_auto_is_transformers_where_it_is_asked_for_or_something_needs_it(path):
    pinned = [{"engine": "transformers"}, {"dtype": "float32"}, {"limits": {"max_live": 200}}]
    engines = [MARALLM(path, **settings).engine for settings in pinned]
    assert (
        {engine.runs_on.name for engine in engines} == {engine.model.engine for engine in engines} == {"transformers"}
    )
    assert engines[0].generate("hi", max_new_tokens=4).text == engines[1].generate("hi", max_new_tokens=4).text


def test_auto_leaves_kinds_of_models_that_it_can_not_run_to_transformers(path, monkeypatch):
    from mara_integrations.models.llama_cpp.library import library

    monkeypatch.setattr(library(), "llama_model_is_recurrent", lambda handle: True)
    engine = MARAEngine(path, device="cpu", max_new_tokens=4)  # loaded by nobody else

    assert engine.outline.context_window == 2048
    assert engine.model.engine == engine.runs_on.name == "transformers" and "recurrent" in engine.runs_on.reason
    assert engine.generate("hi").token_ids == make(path, "transformers").generate("hi", max_new_tokens=4).token_ids
    for settings in ({"engine": "llama.cpp"}, {"model_kwargs": {"n_ctx": 99}}):
        with pytest.raises(UnsupportedModelError, match=r"recurrent.*engine='transformers'"):
            MARAEngine(path, device="cpu", **settings).load()


def test_cached_answers_of_one_engine_are_not_those_of_the_other(path):
    keys = {
        ChatMARA(path, **how)._get_llm_string() for how in ({}, {"engine": "llama.cpp"}, {"engine": "transformers"})
    }
    assert len(keys) == 2


def test_the_command_line_takes_it_for_a_file(path):
    from mara_integrations.cli import app

    asked = ["generate", "hi", "--model", path, "--max-new-tokens", "6", "--no-stream"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == MARAEngine(path, engine="llama.cpp", max_new_tokens=6).generate("hi").text.strip()


# --- how much it reads


def test_the_window_is_the_models_where_memory_holds_it(path):
    engine = MARAEngine(path, max_new_tokens=4)
    assert engine.outline.context_window == 2048
    assert len(engine.generate("long " * 300).token_ids) == 4  # with the template, some 1,500 tokens
    assert engine.verify("long " * 300).holds


def test_the_window_is_what_memory_holds_where_that_is_less(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MARA_CACHE_DIR", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "wide.gguf", oracle(max_position_embeddings=8192))
    cell = load_model(ModelSpec(file, engine="llama.cpp")).model.cell_bytes
    room = [3000]  # a half of what the file leaves is for keys and values
    free = "mara_integrations.models.memory.free_ram_bytes"
    monkeypatch.setattr(free, lambda: file.stat().st_size + 2 * room[0] * cell)

    with caplog.at_level(logging.INFO, "mara_integrations"):
        engine = MARAEngine(file, device="cpu", max_new_tokens=4)
        assert engine.model.context_window == 3000
    assert "room for 3,000 tokens of the 8,192" in caplog.text
    assert len(engine.generate("long " * 500).token_ids) == 4
    with pytest.raises(ContextLengthError, match=r"3000 tokens.*n_ctx"):
        engine.generate("long " * 700)
    assert MARAEngine(file, model_kwargs={"n_ctx": 5000}).model.context_window == 5000

    room[0] = 2500  # when a second context is made
    assert 2500 <= backend_of(engine.model).reserve.row_bytes // cell < 2600
