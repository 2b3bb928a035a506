"""LangChain's own suite for chat models, on vLLM in this process, under a Q-head.

The model is tiny and random, and ends no JSON with numbers or strings of any length. So the suite's tools and schemas
are left to the real model on the other engines; those with an end are in `test_engine.py` and `test_llama_index.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel

from mara_integrations import ChatMARA

suites = pytest.importorskip("langchain_tests.integration_tests")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of vLLM and what it imports
    pytest.mark.timeout(900),  # vLLM starts in 20 s on an idle machine
]


class TestIntegration(suites.ChatModelIntegrationTests):
    @pytest.fixture(scope="class", autouse=True)
    def params(self, served: Any, environment: Any) -> Iterator[None]:
        root, _, heads = served
        kwargs = {"max_model_len": 2048, "kv_cache_memory_bytes": 1 << 28}
        settings = {"model": str(root / "tiny"), "engine": "vllm", "model_kwargs": kwargs}
        type(self).settings = {**settings, "head": heads["q0"], "max_tokens": 12, "top_k": 8}
        with ChatMARA(**self.settings).engine.load():  # for all tests
            yield

    settings: dict[str, Any] = {}  # noqa: RUF012  # set once

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatMARA

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return self.settings

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def supports_model_override(self) -> bool:
        return False

    def test_its_head_takes_part(self, model: BaseChatModel) -> None:
        assert model.invoke("hi").content != model.invoke("hi", head=None).content
