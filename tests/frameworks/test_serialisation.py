"""LangChain's own serialisation: settings are told, weights are not built from them."""

from __future__ import annotations

import json
import pickle

import pytest
from langchain_core.load import dumpd, load

from mara_integrations.frameworks.langchain import ChatMARA

SECRET = "hf_secret"


def chat() -> ChatMARA:
    return ChatMARA("org/model", head="heads/x", temperature=0.5, model_kwargs={"proxies": SECRET})


@pytest.mark.filterwarnings("ignore:The function `load` is in beta")
def test_dumpd_tells_the_settings_without_secrets_and_load_refuses_them() -> None:
    dumped = dumpd(chat())

    assert dumped["type"] == "not_implemented" and "org/model" in dumped["repr"] and "heads/x" in dumped["repr"]
    assert SECRET not in json.dumps(dumped)
    with pytest.raises(NotImplementedError, match="doesn't implement serialization"):
        load(dumped, allowed_objects="messages")


def test_a_chat_model_whose_model_is_named_pickles() -> None:
    again = pickle.loads(pickle.dumps(chat()))

    assert (again.model, again.head, again.temperature) == ("org/model", "heads/x", 0.5)
    assert again.model_kwargs == {"proxies": SECRET}
