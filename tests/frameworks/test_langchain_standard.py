"""LangChain's own suites for chat models, as published in `langchain-tests`.

The integration suite runs the real 135M model: without a head, under one of the paper's form, and under a Q-head on
llama.cpp. `MARA_TEST_MODEL` names a larger model; what is expected to fail on the small one is then expected to pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from mara_integrations import ChatMARA, MARAEngine
from mara_integrations.heads.source import HeadSource
from mara_integrations.testing import random_head

LARGE = os.environ.get("MARA_TEST_MODEL")
MODEL = LARGE or "smollm2"


@pytest.mark.filterwarnings("ignore:.*without effect")  # it passes what hosted models take
class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatMARA

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "smollm2", "head": "heads/not-looked-up"}


@pytest.fixture(scope="class")
def engine(request: pytest.FixtureRequest) -> Iterator[MARAEngine]:
    """Keep the model and its worker from one test of a class to the next."""
    with ChatMARA(MODEL, **request.cls.engine_params).engine as engine:
        assert engine.model  # loads it
        yield engine


@pytest.mark.slow
@pytest.mark.usefixtures("engine")
class TestIntegration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatMARA

    # A small model writes text without end, so it gets few tokens. What has a form has to come to its end: it gets
    # more of them, and without sampling a small model repeats itself inside a string.
    small_params: dict[str, Any] = {"max_tokens": 12}  # noqa: RUF012  # never changed
    engine_params: dict[str, Any] = {}  # noqa: RUF012
    seeds: dict[str, int] = {"structured_output": 6, "json_mode": 6}  # noqa: RUF012  # under which its objects are short

    @pytest.fixture(autouse=True)
    def what_the_reply_needs(self, request: pytest.FixtureRequest) -> None:
        subjects = {"tool_calling": 100, "tool_choice": 100, "as_tools": 100, "few_shot": 100, "unicode": 300}
        for subject, max_tokens in subjects.items():
            if subject in request.node.name:
                self.small_params = {"max_tokens": max_tokens}
        for subject, seed in self.seeds.items():
            if subject in request.node.name:
                self.small_params = {"max_tokens": 300, "temperature": 1.0, "seed": seed}

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": MODEL, **self.engine_params, **({"max_tokens": 200} if LARGE else self.small_params)}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return False  # which model runs is a setting of the object: it may have to be loaded

    @pytest.mark.xfail(not LARGE, reason="no tool_choice is given, and 135M parameters do not call a tool unasked")
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)


class _Headed(TestIntegration):
    hidden_size: int

    @pytest.fixture(autouse=True)
    def what_the_head_fits(self, engine: MARAEngine) -> None:
        self.hidden_size = engine.model.hidden_size

    def head(self, hidden_size: int) -> HeadSource:
        raise NotImplementedError

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**super().chat_model_params, "head": self.head(self.hidden_size)}

    def test_its_head_takes_part(self, model: BaseChatModel) -> None:
        asked = ["Name three birds and say what each eats.", "Describe the sea.", "Why do leaves fall?"]
        gates = [reply.response_metadata["gate"] for reply in model.batch(asked, max_tokens=24)]

        assert all(gate["accepted"] > 0 for gate in gates)
        assert any(gate["rejected"] > 0 for gate in gates)


class TestIntegrationPaper(_Headed):
    def head(self, hidden_size: int) -> HeadSource:
        # it samples nothing: under most random heads a small model repeats itself in a string
        return random_head(hidden_size, "paper", accept_rate=0.7, seed=2)

    @pytest.mark.xfail(not LARGE, reason="under this head the small model ends no string of other alphabets")
    def test_unicode_tool_call_integration(self, model: BaseChatModel) -> None:
        super().test_unicode_tool_call_integration(model)


@pytest.mark.skipif(not any(map(find_spec, ("llama_cpp", "xllamacpp"))), reason="llama.cpp is not installed")
@pytest.mark.skipif(bool(LARGE) and not str(LARGE).endswith(".gguf"), reason=f"llama.cpp runs .gguf, not {LARGE}")
class TestIntegrationLlamaCpp(_Headed):
    engine_params: dict[str, Any] = {"engine": "llama.cpp", "model_kwargs": {"n_threads": 1}}  # noqa: RUF012
    seeds: dict[str, int] = {"structured_output": 10, "json_mode": 6}  # noqa: RUF012

    def head(self, hidden_size: int) -> HeadSource:
        return random_head(hidden_size, "q", scale=0.05)
