"""LangChain's own suite for chat models, as published; see https://docs.langchain.com/oss/python/contributing."""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_tests.unit_tests import ChatModelUnitTests

from mara_integrations import ChatMARA


class TestChatMARAUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatMARA

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "smollm2", "head": "heads/not-looked-up"}
