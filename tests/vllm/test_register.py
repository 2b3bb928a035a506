"""The plug-in costs nothing where it is not asked for, and says what is wrong where it can't run."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import mara_integrations.vllm as plugin
from mara_integrations.errors import ConfigError
from mara_integrations.testing import random_head
from mara_integrations.vllm.served import head_folder, heads_folder

HEAVY = ("torch", "transformers", "vllm", "langchain_core", "llama_index", "pydantic")


def test_without_heads_nothing_is_imported(monkeypatch):
    code = (
        "import sys, mara_integrations.vllm as plugin; plugin.register(); "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    monkeypatch.delenv("MARA_HEADS", raising=False)
    monkeypatch.delenv("MARA_VLLM_HEADS", raising=False)  # of engines in this process
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_vllm_finds_the_plug_in_by_its_entry_points():
    named = {(e.group, e.value) for group in ("general_plugins", "logits_processors") for e in own(f"vllm.{group}")}
    assert named == {
        ("vllm.general_plugins", "mara_integrations.vllm:register"),
        ("vllm.logits_processors", "mara_integrations.vllm.processor:GateProcessor"),
    }


def own(group):
    found = [entry for entry in entry_points(group=group) if entry.name == "mara"]
    if not found:
        pytest.skip("the installed package is older than its entry points")
    return found


def test_a_folder_that_is_not_there_is_refused_at_the_start(monkeypatch, tmp_path):
    monkeypatch.setenv("MARA_HEADS", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="is not a folder"):
        plugin.register()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", ".hidden", "a\\b", "a\x00b", "x" * 300, "absent"])
def test_a_request_names_heads_by_plain_names_alone(name, tmp_path, monkeypatch):
    random_head(32, "q").save_pretrained(tmp_path / "brand")
    (tmp_path / ".hidden").mkdir()
    monkeypatch.setenv("MARA_HEADS", str(tmp_path))
    assert head_folder("brand", heads_folder()) == tmp_path / "brand"
    with pytest.raises(ConfigError, match=r"is served .*heads are brand"):
        head_folder(name, heads_folder())
