"""`mara-tools inspect`, `import` and `merge`: heads on disk."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from commands import generate, run

from mara_integrations.heads.head import MARAHead
from mara_integrations.messages import Message
from mara_integrations.runtime import MARAEngine
from mara_integrations.testing import random_head

pytestmark = pytest.mark.usefixtures("in_the_folder")


def test_inspect_tells_what_a_head_is(folder):
    said = run("inspect", "head").stdout
    said = " ".join(said.split())
    assert "Head head, form residual, 32 -> 64 -> 16 -> 1, 3,233 parameters" in said
    assert "Model unknown" in said and "Scale 1: at strength 1" in said
    whole = json.loads(run("inspect", "head", "--json").stdout)
    assert whole["parameters"] == 3233 and whole["fingerprint"] == MARAHead.from_pretrained("head").fingerprint


def test_inspect_tells_the_sentence_a_head_was_made_of(folder):
    assert "Sentence" not in run("inspect", "head").stdout
    random_head(32, principle="Be brief.").save_pretrained("brief")
    assert "Sentence Be brief. System prompt none" in " ".join(run("inspect", "brief").stdout.split())
    random_head(32, metrics={"missing_answer": "No idea."}).save_pretrained("grounded")
    assert "Missing answer No idea. System prompt none" in " ".join(run("inspect", "grounded").stdout.split())


def test_inspect_tells_how_a_training_went(rewarded):
    said = " ".join(run("inspect", "rewarded").stdout.split())
    for line in (
        "Method rloo",
        "rows and 2 held out",
        "with mara_integrations 0",
        "On held-out prompts",
        "kl per token ",
    ):
        assert line in said
    assert "vowels" in said and "distinct-2" in said and "\u2502 base \u2502 gated" in said.replace("\u2503", "\u2502")


def test_a_published_actor_becomes_a_folder_that_judges_alike(folder):
    head = random_head(32, "paper")
    torch.save(head.state_dict(), folder / "actor.pth")
    run("convert", "actor.pth", "--output", "converted", "--base-model", "model")
    converted = MARAHead.from_pretrained("converted")
    assert (converted.config.form, converted.config.base_model) == ("paper", "model")
    assert generate("hi", "--head", "converted") == generate("hi", "--head", "actor.pth")
    assert "is a folder" in run("convert", "head", "--output", "again", code=1).stderr


def test_merged_heads_are_one_that_answers_like_their_composition(folder):
    random_head(32, "residual", seed=1, scale=0.7).save_pretrained("other")
    run("merge", "head", "other=0.5", "--output", "merged")
    composed = {MARAHead.from_pretrained("head"): 1.0, MARAHead.from_pretrained("other"): 0.5}
    expected = MARAEngine("model", composed).generate([Message("user", "hi")], max_new_tokens=6).text
    assert generate("hi", "--head", "merged") == expected + "\n"
    assert "nothing to merge" in run("merge", "head", "--output", "x", code=1).stderr
    assert "'paper' form can't be merged" in run("merge", "head", "paper-head", "--output", "x", code=1).stderr


@pytest.mark.parametrize(
    "command",
    [("merge", "head", "head2"), ("convert", "kept.pth"), ("distil", "--head", "head", "--data", "prompts.jsonl")],
    ids=lambda command: command[0],
)
def test_a_head_in_the_output_folder_is_replaced_only_if_that_is_said(folder, command, tmp_path):
    torch.save(random_head(32, "paper").state_dict(), folder / "kept.pth")
    random_head(32, "residual", seed=1).save_pretrained(folder / "head2")
    old = random_head(32, "residual", seed=2).save_pretrained(tmp_path / "old")
    before = MARAHead.from_pretrained(old).fingerprint
    model = ("--model", "model", "--max-reply-tokens", 4) if command[0] == "distil" else ()

    said = run(*command, *model, "--output", old, code=1).stderr
    assert f"error: '{old}' holds a head\nhint: --overwrite replaces it" in said
    assert MARAHead.from_pretrained(old).fingerprint == before

    said = run(*command, *model, "--output", old, "--overwrite").stdout
    assert MARAHead.from_pretrained(old).fingerprint != before
    assert f"\nHead    {old}: form " in f"\n{said}" and f"  mara-tools chat --head {old}" in said


@pytest.mark.parametrize("name", ["escaped", "../escaped", "/tmp/escaped"])
def test_merge_copies_what_training_kept_and_writes_nowhere_else(folder, name, tmp_path):
    (tmp_path / "secret").write_text("the private key")
    spec = {"kind": "reward_model", "name": name, "file": "rewards/x.safetensors", "sha256": "0" * 64}
    hostile = random_head(32, "residual", rewards=(spec,)).save_pretrained(tmp_path / "in/hostile")
    (hostile / "rewards").mkdir()
    (hostile / "rewards" / "x.safetensors").symlink_to(tmp_path / "secret")

    said = run("merge", "head", hostile, "--output", tmp_path / "out/merged", code=1).stderr

    assert "x.safetensors' is a link out of the head's folder" in said
    assert {path.name for path in tmp_path.rglob("*") if path.is_file() and "hostile" not in str(path)} == {"secret"}


def test_merge_writes_a_reward_model_of_any_name_into_its_folder(folder, tmp_path):
    kept = tmp_path / "in/rewards/x.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"data")
    sha256 = hashlib.sha256(b"data").hexdigest()
    spec = {"kind": "reward_model", "name": "../../../escaped", "file": "rewards/x.safetensors", "sha256": sha256}
    random_head(32, "residual", rewards=(spec,)).save_pretrained(tmp_path / "in")

    run("merge", "head", tmp_path / "in", "--output", tmp_path / "out/merged")

    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.safetensors")}
    assert written == {"merged/head.safetensors", "merged/rewards/escaped.safetensors"}


def test_inspect_prints_no_control_characters(folder, tmp_path):
    training = {"system_prompt": "\x1b]0;title\x07", "\x1b[2J": 1}
    metrics = {"\x1b[2J": 1.0}
    random_head(32, "residual", training=training, metrics=metrics, rewards=({"kind": "\x1b[2J"},)).save_pretrained(
        tmp_path / "h"
    )
    for form in ((), ("--json",)):
        assert "\x1b" not in run("inspect", tmp_path / "h", *form).stdout
