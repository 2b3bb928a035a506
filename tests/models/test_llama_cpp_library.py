"""llama.cpp's library where llama-cpp-python brings it: its log, and releases that are too old."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mara_integrations.errors import ModelError
from mara_integrations.models.llama_cpp import library
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.runtime import MARAEngine

if find_spec("xllamacpp") is None or find_spec("llama_cpp") is not None:
    pytest.skip("its library stands in for that of llama-cpp-python", allow_module_level=True)

from tiny_gguf import oracle, write_gguf

API = """
from types import SimpleNamespace

from mara_integrations.models.llama_cpp.library import ContextParams, ModelParams

_lib = SimpleNamespace(_name={library!r})
llama_model_params, llama_context_params = ModelParams, {context_params}
"""
LOG = """
import ctypes, logging, sys

logger = logging.getLogger("llama-cpp-python")

@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def llama_log_callback(level, text, data):
    if logger.level <= {1: 20, 2: 30, 3: 40}.get(level, 10):
        print(text.decode(), end="", file=sys.stderr)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package with what we use of llama-cpp-python, over the library of xllamacpp."""
    spec = find_spec("xllamacpp")
    (file,) = Path(spec.origin).parent.glob("xllamacpp*.so")
    folder, logger = tmp_path / "site" / "llama_cpp", logging.getLogger("llama-cpp-python")

    def installed(context_params="ContextParams"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("from . import _logger, llama_cpp")
        (folder / "_logger.py").write_text(LOG)
        (folder / "llama_cpp.py").write_text(API.format(library=str(file), context_params=context_params))
        monkeypatch.syspath_prepend(folder.parent)
        library.library.cache_clear()
        return logger

    monkeypatch.setenv("MARA_CACHE_DIR", str(tmp_path / "cache"))
    before = library.library()
    yield installed
    logger.setLevel(logging.NOTSET)
    monkeypatch.undo()
    for name in [name for name in sys.modules if name.partition(".")[0] == "llama_cpp"]:
        del sys.modules[name]
    library.library.cache_clear()
    assert library.library().source == before.source  # and its log is heard again


def test_its_log_is_printed_for_those_alone_who_use_it(install, tmp_path, capfd):
    file = str(write_gguf(tmp_path / "tiny.gguf"))
    reply = MARAEngine(file, engine="llama.cpp", model_kwargs={"n_threads": 1}, max_new_tokens=4).generate("hi")
    logger = install()

    engine = MARAEngine(file, engine="llama.cpp", model_kwargs={"n_threads": 1, "n_ctx": 500}, max_new_tokens=4)
    assert engine.generate("hi").token_ids == reply.token_ids
    assert engine.model.model.library.source.startswith("llama-cpp-python")
    assert "llama_model_loader" not in capfd.readouterr().err

    logger.setLevel(logging.DEBUG)  # as `Llama(..., verbose=True)` does
    load_model(ModelSpec(file, engine="llama.cpp", model_kwargs={"n_ctx": 501}))
    assert "llama_model_loader" in capfd.readouterr().err


def test_the_cause_of_an_error_is_read_from_its_log(install, tmp_path):
    install()
    model = oracle()
    model.config.num_hidden_layers += 1  # of which there are no weights
    file = write_gguf(tmp_path / "few.gguf", model)

    with pytest.raises(ModelError, match=r"llama.cpp can't load 'few.gguf': .*'blk.2.attn_norm.weight' not found"):
        load_model(ModelSpec(str(file), engine="llama.cpp"))


def test_a_release_without_a_setting_that_is_needed_is_named(install, tmp_path):
    install("type('Old', (ContextParams.__base__,), {'_fields_': ContextParams._fields_[:-5]})")

    with pytest.raises(ModelError, match="has no setting kv_unified") as refused:
        load_model(ModelSpec(str(write_gguf(tmp_path / "tiny.gguf")), engine="llama.cpp"))
    assert "--upgrade" in str(refused.value.hint)
