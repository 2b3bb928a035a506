"""A tiny model with two heads, as an application and as its client."""

from __future__ import annotations

import pytest

pytest.importorskip("starlette", reason="needs the serve extra")
pytest.importorskip("prometheus_client", reason="needs the serve extra")

from serving import client_of

from mara_integrations.runtime import MARAEngine
from mara_integrations.server import create_app
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    for seed, name in enumerate(("brand", "calm")):
        random_head(32, "residual", seed=seed).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def engine():
    return MARAEngine((tiny_model(), tiny_tokenizer())).load()


@pytest.fixture
def heads(folder):
    return {name: str(folder / name) for name in ("brand", "calm")}


@pytest.fixture
def app(engine, heads):
    return create_app(engine, heads, name="tiny")


@pytest.fixture
async def client(app):
    async with client_of(app) as client:
        yield client
