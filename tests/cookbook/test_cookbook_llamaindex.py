"""The LlamaIndex scripts of the cookbook run, on the real model."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_index.core
import pytest
from llama_index.core import Settings

from mara_integrations.testing import random_head

COOKBOOK = Path(__file__).parents[2] / "cookbook"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("embedded")]


@pytest.fixture(autouse=True)
def untouched_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_index.core, "global_tokenizer", None)
    monkeypatch.setattr(Settings, "_llm", None)
    monkeypatch.syspath_prepend(str(COOKBOOK))


@pytest.fixture(autouse=True)
def event_loop() -> Iterator[None]:
    """LlamaIndex makes an event loop in synchronous code too, and never closes it."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.fixture
def head(tmp_path: Path) -> str:
    random_head(576, "residual", scale=0.05).save_pretrained(tmp_path / "head")
    return str(tmp_path / "head")


def script(name: str) -> Any:
    return importlib.import_module(name)


def test_a_handbook_is_asked_with_a_given_head(head: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llama_index.retrievers.bm25")

    answers = script("07_llamaindex_rag").main(head)

    assert answers["source"] == "security.txt"
    assert answers["base"] and answers["gated"] != answers["base"]
    assert answers["gated"] in capsys.readouterr().out


def test_a_handbook_is_asked_without_a_head() -> None:
    pytest.importorskip("llama_index.retrievers.bm25")

    assert script("07_llamaindex_rag").main().keys() == {"base", "source"}


def test_what_a_huggingfacellm_does_and_does_not_do_is_done() -> None:
    migrating = script("08_migrating_from_huggingfacellm")

    found = migrating.main()

    assert found["context_window"] == 8192
    assert "Paris" in found["complete"]
    assert found["raw"]["finish_reason"] == "length" and len(found["raw"]["token_ids"]) == 4
    assert "8" not in found["stopped"]
    assert isinstance(found["object"], migrating.Place)
    assert all(found["async"]) and found["stream"]
