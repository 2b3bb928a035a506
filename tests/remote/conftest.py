"""A tiny model with a head, in this process and in a server; and a server that answers as vLLM does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("openai", reason="needs the client extra")
pytest.importorskip("starlette", reason="needs the serve extra")
pytest.importorskip("uvicorn", reason="needs the serve extra")
pytest.importorskip("prometheus_client", reason="needs the serve extra")

from serving import serving
from vllm_like import VLLMLike

from mara_integrations.remote.connection import Address
from mara_integrations.remote.engine import ServerEngine
from mara_integrations.runtime import MARAEngine
from mara_integrations.server import create_app
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def heads(tmp_path_factory):
    """Folders of heads by the names that the server has for them."""
    folder = tmp_path_factory.mktemp("heads")
    told = {"brand": {}, "calm": {"system_prompt": "Be calm."}}
    for seed, (name, config) in enumerate(told.items()):
        random_head(32, "q", seed=seed, **config).save_pretrained(folder / name)
    return {name: str(folder / name) for name in told}


@pytest.fixture(scope="session")
def local():
    with MARAEngine((tiny_model(), tiny_tokenizer())) as engine:
        yield engine.load()


@pytest.fixture(scope="session")
def server(local, heads):
    """The server: its app, and its URL."""
    app = create_app(local, heads, name="tiny", api_key="secret")
    with serving(app) as port:
        yield SimpleNamespace(app=app, url=f"http://127.0.0.1:{port}")


@pytest.fixture
def make(server):
    """Makes engines on the server, and closes them."""
    made = []

    def make(model="tiny", head=None, url=server.url, api_key="secret", max_retries=0, timeout=60, **defaults):
        made.append(ServerEngine(Address.of(url, api_key, timeout, max_retries), model, head, **defaults))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def engine(make):
    return make(max_new_tokens=12)


@pytest.fixture
def vllm():
    server = VLLMLike()
    with serving(server.app) as port:
        server.url = f"http://127.0.0.1:{port}"
        yield server
