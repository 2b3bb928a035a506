"""Heads on the Hub: what is downloaded, what is uploaded, and what a name means."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from mara_integrations.errors import HeadError, OutputError
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.hub import check_can_push, locate, push_folder
from mara_integrations.testing import random_head


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with one head, and a record of what it was asked for."""
    monkeypatch.chdir(tmp_path)
    snapshot = random_head(16, "residual").save_pretrained(tmp_path / "cache/snapshot")
    asked = []

    def download(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision))
        if repo_id != "org/brand":
            raise OSError("no such repository")
        assert not [pattern for pattern in allow_patterns if not pattern.endswith((".safetensors", ".json", ".md"))]
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return SimpleNamespace(asked=asked, snapshot=snapshot)


def test_a_hub_id_is_downloaded(hub):
    assert locate("org/brand").path == hub.snapshot
    assert locate("hf:org/brand@v2").path == hub.snapshot
    assert hub.asked == [("org/brand", None), ("org/brand", "v2")]
    assert MARAHead.from_pretrained("hf:org/brand").config.hidden_size == 16


def test_what_exists_here_is_local(hub, tmp_path):
    random_head(8).save_pretrained("org/brand")
    assert locate("org/brand").path == tmp_path / "org/brand" and hub.asked == []
    assert locate("hf:org/brand").path == hub.snapshot, "unless the Hub is named"


@pytest.mark.parametrize(
    "name", ["./org/brand", "../org/brand", "/org/brand", "~/org/brand", "brand", "org/brand.pth", Path("org/brand")]
)
def test_a_path_is_never_looked_for_on_the_hub(hub, name):
    with pytest.raises(HeadError, match="no head at"):
        locate(name)
    assert hub.asked == []


def test_a_name_beside_others_of_its_folder_is_a_path(hub):
    """`heads/brand` that is missing is a mistake in a path, not somebody's repository."""
    Path("org").mkdir()
    with pytest.raises(HeadError, match="there is no such folder") as caught:
        locate("org/brand")
    assert "hf:org/brand" in caught.value.hint and hub.asked == []


def test_a_misspelt_head_comes_with_the_head_of_that_folder_which_was_meant(hub):
    random_head(8).save_pretrained("heads/brand-voice")
    Path("heads/brand-vice").mkdir()  # no head
    with pytest.raises(HeadError, match="there is no such folder") as caught:
        locate("heads/brand-voic")
    assert caught.value.hint.startswith("did you mean 'heads/brand-voice'?")


class Api:
    """What `huggingface_hub.HfApi` was asked."""

    def __init__(self, token=None):
        pass

    is_private: bool | None = None  # of the repository; None: there is none
    uploaded: dict[str, str]

    def whoami(self):
        pass

    def repo_info(self, repo_id):
        if self.is_private is None:
            response = httpx.Response(404, request=httpx.Request("GET", "https://x"))
            raise RepositoryNotFoundError("none", response=response)
        return SimpleNamespace(private=self.is_private)

    def create_repo(self, repo_id, private, exist_ok):
        type(self).is_private = private

    def upload_folder(self, repo_id, folder_path, commit_message):
        files = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        type(self).uploaded = {path.relative_to(folder_path).as_posix(): path for path in files}
        type(self).config = json.loads((Path(folder_path) / "head_config.json").read_text())
        type(self).card = (Path(folder_path) / "README.md").read_text()
        return "address"


@pytest.fixture
def api(monkeypatch):
    made = type("Api", (Api,), {})
    monkeypatch.setattr("huggingface_hub.HfApi", made)
    return made


def test_only_the_head_is_uploaded_and_privately(api, tmp_path):
    rewards = ({"kind": "function", "path": "/home/me/rewards.py:f"},)
    training = {"model": "/home/me/model", "system_prompt": "/be brief"}
    head = random_head(16, "residual", base_model="/home/me/model", rewards=rewards, training=training)
    folder = head.save_pretrained(tmp_path / "h")
    for name in ("reward-failure.json", "train.yaml", "metrics.jsonl", ".env", "notes.txt"):
        (folder / name).write_text("private")
    (folder / "rewards").mkdir()
    (folder / "rewards" / "stray.safetensors").write_text("private")

    assert push_folder(folder, "me/head") == "address"

    assert sorted(api.uploaded) == ["README.md", "head.safetensors", "head_config.json"]
    assert api.is_private is True
    assert "/home/me" not in json.dumps(api.config) + api.card and "base_model: model" in api.card
    assert api.config["rewards"][0]["path"] == "rewards.py:f" and api.config["training"]["system_prompt"] == "/be brief"


def test_a_public_repository_needs_a_word(api, tmp_path):
    folder = random_head(16, "residual").save_pretrained(tmp_path / "h")
    api.is_private = False
    for push in (lambda: check_can_push("me/head"), lambda: push_folder(folder, "me/head")):
        with pytest.raises(OutputError, match="'me/head' is public"):
            push()
    check_can_push("me/head", public=True)
    assert push_folder(folder, "me/head", public=True) == "address"
