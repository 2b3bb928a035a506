"""Shared by all tests: no network, one thread a process (the tests run in parallel), the real model once."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import settings

from mara_integrations.engine.speculation.cost import CostCurve
from mara_integrations.progress import Reporter
from mara_integrations.runtime import worker_for
from mara_integrations.testing import ScriptedBackend, random_head, tiny_model, tiny_tokenizer

settings.register_profile("unhurried", deadline=None)  # on a busy machine any example may take long
settings.load_profile("unhurried")
torch.set_num_threads(1)
torch.cpu.get_capabilities = lambda: {}  # trainings take float32: what tests find must not depend on the processor


# What reaches the measured folders (engine, heads, data) most directly. Measuring the rest costs a fifth of its time.
COVERED = ("engine", "heads", "data", "replies", "server", "test_custom_generate.py", "test_runtime.py")


def pytest_collection_modifyitems(config, items):
    """Modules with slow tests come first: at the end, no process is left with a long one. Coverage is that of some."""
    with_slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in with_slow)
    if config.getoption("cov_source", default=None):
        tests = Path(__file__).parent
        for item in items:
            if item.path.relative_to(tests).parts[0] not in COVERED:
                item.add_marker("no_cover")


def pytest_collection_finish():
    """Exclude all imported modules from garbage collection: each collection then takes much less time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Let Python free the modules as it ends: libraries say at length what is left."""
    gc.unfreeze()


class Interrupting(Reporter):
    """Ctrl-C once a stage has come this far."""

    def __init__(self, stage, after):
        self.name, self.left = stage, after

    @contextmanager
    def stage(self, name, total):
        def advance(count):
            if name == self.name:
                self.left -= count
                if self.left <= 0:
                    raise KeyboardInterrupt

        yield advance


class Notes(Reporter):
    """Remembers what is said."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


class Forwards:
    """Counts the forwards of a model from now on, and makes them take some time, as those of a real model do."""

    def __init__(self, monkeypatch, llm, pause_s=0.0):
        self.count = self.widest = 0  # sequences in one forward
        self._decoder = worker_for(llm.engine.model).decoder
        feed = self._decoder.backend.feed

        def counting(segments):
            self.count += 1
            self.widest = max(self.widest, len(segments))
            time.sleep(pause_s)
            return feed(segments)

        monkeypatch.setattr(self._decoder.backend, "feed", counting)

    async def reached(self, count):
        await _until(lambda: self.count >= count)

    async def settled(self):
        """Wait until nothing is decoded any more; how many more forwards there were."""
        before = self.count
        await _until(lambda: self._decoder.is_idle)
        return self.count - before


async def _until(condition):
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise TimeoutError


@pytest.fixture(autouse=True)
def own_reply_cache(tmp_path_factory, monkeypatch):
    """No test finds the replies of another, nor what was said of them."""
    folder = tmp_path_factory.mktemp("cache")
    for module in ("training.records.store", "rewards.judges.session"):
        monkeypatch.setattr(f"mara_integrations.{module}.cache_dir", lambda: folder)


@pytest.fixture
def nothing_fed_ahead(monkeypatch):
    """For models first used in the test, two tokens in a forward cost as much as two forwards, whatever the machine."""
    monkeypatch.setattr("mara_integrations.engine.decoder.measure", lambda *_: CostCurve(((1, 1.0), (2, 2.0))))


@pytest.fixture
def interrupting():
    return Interrupting


@pytest.fixture
def notes():
    return Notes()


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder_model(saved_model, tmp_path):
    """A model as a folder on disk, as `--model` names one."""
    return str(shutil.copytree(saved_model, tmp_path / "tiny"))


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} {chr(97 + i % 26)}?"}) + "\n" for i in range(20)))
    return path


# --- a tiny model in the frameworks


@pytest.fixture(scope="module")
def loaded():
    return tiny_model(max_position_embeddings=2048), tiny_tokenizer()


@pytest.fixture
def llm(loaded):
    """Of LangChain; the tests of LlamaIndex and of `MARALLM` have their own."""
    from mara_integrations import ChatMARA

    return ChatMARA(loaded, head=random_head(32), max_tokens=12)


@pytest.fixture(scope="module")
def embedded():
    """The embedded 135M model, which stays loaded from one test of a module to the next, and its worker with it."""
    from mara_integrations import MARAEngine

    with MARAEngine("smollm2") as engine:
        assert engine.model  # loads it
        yield engine


@pytest.fixture
def count_forwards(monkeypatch):
    return partial(Forwards, monkeypatch)


@pytest.fixture
def says(llm, monkeypatch):
    """Makes the model of `llm` prefer to write a given reply."""
    tokenizer = llm.engine.model.tokenizer

    def scripted(reply, **settings):
        wanted, turn = ([*tokenizer(text)["input_ids"]] for text in (reply, "[assistant] "))
        wanted.append(tokenizer.eos_token_id)

        def script(tokens):
            tokens = list(tokens)
            begins = (i for i in range(len(tokens), -1, -1) if tokens[i : i + len(turn)] == turn)
            written = max(0, len(tokens) - next(begins, len(tokens)) - len(turn))
            return [30.0 * (token_id == wanted[min(written, len(wanted) - 1)]) for token_id in range(256)]

        monkeypatch.setattr(worker_for(llm.engine.model).decoder, "backend", ScriptedBackend(script, 256))
        return llm.model_copy(update={"head": None, "max_tokens": 300, **settings})

    return scripted


@pytest.fixture
def event_loop():
    """LlamaIndex makes an event loop in synchronous code too, and never closes it."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()
