"""Settings of decoding are described once, and every door shows that description."""

from __future__ import annotations

from typing import Any

import pytest

from mara_integrations import MARALLM
from mara_integrations.frameworks.langchain import ChatMARA
from mara_integrations.sampling import GateParams, SamplingParams, describe
from mara_integrations.server.openapi import openapi

FIELDS = {**SamplingParams.model_fields, **GateParams.model_fields}
NAMES = {"max_new_tokens": "max_tokens"}  # under which both frameworks know it


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_says_what_it_means(name: str) -> None:
    assert describe(name).endswith(".") and len(describe(name)) > 20


@pytest.mark.parametrize("door", [MARALLM, ChatMARA])
@pytest.mark.parametrize("name", FIELDS)
def test_the_frameworks_say_the_same(door: type, name: str) -> None:
    shown = door.model_fields[NAMES.get(name, name)].description  # type: ignore[attr-defined]

    assert shown.startswith(describe(name))


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_candidates", "seed", "strength", "selection"])
def test_the_server_says_the_same(name: str) -> None:
    (schema,) = [each for each in openapi(has_key=False)["components"]["schemas"].values() if _is_chat(each)]

    assert schema["properties"][name]["description"] == describe(name)


def test_the_command_line_says_the_same() -> None:
    from typer.main import get_command

    from mara_integrations.cli.app import app

    options = {option.name: option for option in get_command(app).commands["generate"].params}  # type: ignore[attr-defined]

    for name in ("temperature", "top_k", "top_p", "max_new_tokens", "seed", "strength", "stop"):
        assert options[name].help.startswith(describe(name))


def _is_chat(schema: dict[str, Any]) -> bool:
    return {"messages", "temperature"} <= set(schema.get("properties", {}))
