"""`mara-tools serve`: what is checked before the model is loaded, and what is served."""

from __future__ import annotations

import pytest
from serving import CHAT
from typer.testing import CliRunner

pytest.importorskip("uvicorn", reason="needs the serve extra")
pytest.importorskip("starlette", reason="needs the serve extra")

from starlette.testclient import TestClient

from mara_integrations.cli import app as cli
from mara_integrations.engine.limits import EngineLimits
from mara_integrations.runtime import MARAEngine
from mara_integrations.server import listening
from mara_integrations.testing import random_head


@pytest.fixture
def served(monkeypatch):
    """What was to be served, in place of serving it."""
    served = {}

    def serve(app, sockets):
        served.update(app=app, port=listening.port_of(sockets))

    monkeypatch.setattr(listening, "serve", serve)
    return served


@pytest.fixture
def head(tmp_path):
    random_head(32, "residual").save_pretrained(tmp_path / "heads" / "brand")
    return str(tmp_path / "heads" / "brand")


def mara_tools(*arguments, **settings):
    return CliRunner().invoke(cli, ["serve", "--port", "0", *arguments], **settings)


def test_a_model_is_served_with_its_heads(folder_model, head, served):
    said = mara_tools("--model", folder_model, "--head", f"voice={head}", "--head", head, "--api-key", "secret")
    assert said.exit_code == 0, said.stderr
    assert "tiny, tiny:voice, tiny:brand" in said.stdout
    assert f"http://127.0.0.1:{served['port']}/v1" in said.stdout
    with TestClient(served["app"]) as client:
        client.headers["authorization"] = "Bearer secret"
        assert client.post("/v1/chat/completions", json={**CHAT, "model": "tiny:voice"}).status_code == 200


def test_the_models_name_may_be_given(folder_model, served):
    assert "assistant" in mara_tools("--model", folder_model, "--name", "assistant").stdout
    with TestClient(served["app"]) as client:
        assert client.post("/v1/chat/completions", json={**CHAT, "model": "assistant"}).status_code == 200


def test_the_engines_limits_are_options(folder_model, served, monkeypatch):
    made = {}
    init = MARAEngine.__init__
    monkeypatch.setattr(MARAEngine, "__init__", lambda self, *a, **more: init(self, *a, **(made.update(more) or more)))
    sizes = ("--kv-bytes", "64MiB", "--prefix-cache-bytes", "0", "--head-cache-bytes", "1GiB")
    said = mara_tools("--model", folder_model, "--max-live", "8", "--max-running", "2000", *sizes)
    assert said.exit_code == 0, said.stderr
    assert made["limits"] == EngineLimits(
        max_live=8, max_waiting=2000, kv_bytes=64 << 20, prefix_cache_bytes=0, head_cache_bytes=1 << 30
    )


def test_limits_and_origins_reach_the_server(folder_model, served):
    mara_tools("--model", folder_model, "--max-body-bytes", "100", "--allow-origin", "https://chat.example")
    with TestClient(served["app"]) as client:
        client.headers["origin"] = "https://chat.example"
        response = client.post("/v1/chat/completions", json={**CHAT, "user": "x" * 100})
        assert response.status_code == 413
        assert response.headers["access-control-allow-origin"] == "https://chat.example"


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--api-key", ""], {}, "the API key is empty"),
        ([], {"MARA_API_KEY": ""}, "the API key in MARA_API_KEY is empty"),
        (["--head", "a=x", "--head", "a=y"], {}, "two heads are called 'a'"),
        (["--head", "a:b=x"], {}, "--head 'a:b=x' is not allowed"),
        (["--head", "a="], {}, "--head 'a=' is not allowed"),
        (["--kv-bytes", "lots"], {}, "--kv-bytes 'lots' is not allowed\nhint: a size, such as 512MiB or 8GiB"),
        (["--kv-bytes", "1"], {}, "kv_bytes=1 is not allowed"),
        (["--max-body-bytes", "0"], {}, "max_body_bytes=0 is not allowed"),
        (["--host", "no.such.host.invalid"], {}, "host 'no.such.host.invalid' is not known"),
    ],
)
def test_what_can_not_be_served_is_said_before_the_model_is_loaded(arguments, environment, said, served):
    answer = mara_tools("--model", "no-such-model", *arguments, env=environment)
    assert answer.exit_code == 1 and said in answer.stderr and not served


def test_a_port_in_use_is_said_before_the_model_is_loaded(served):
    (opened,) = listening.bind("127.0.0.1", 0)
    with opened:
        port = str(listening.port_of([opened]))
        answer = CliRunner().invoke(cli, ["serve", "--model", "no-such-model", "--port", port])
    assert answer.exit_code == 1 and f"error: port {port} of 127.0.0.1 is in use" in answer.stderr


def test_a_head_that_does_not_fit_is_refused_before_the_server_starts(folder_model, tmp_path, served):
    random_head(48, "residual").save_pretrained(tmp_path / "wide")
    answer = mara_tools("--model", folder_model, "--head", str(tmp_path / "wide"))
    assert answer.exit_code == 1 and "expects hidden size 48" in answer.stderr and not served


def test_a_server_for_everybody_is_warned_of(folder_model, served):
    assert "without --api-key" in mara_tools("--model", folder_model, "--host", "0.0.0.0").stderr
    assert "without" not in mara_tools("--model", folder_model, "--host", "0.0.0.0", "--api-key", "secret").stderr
    assert "without" not in mara_tools("--model", folder_model).stderr
