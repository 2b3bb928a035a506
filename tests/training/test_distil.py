"""Distilling: a Q-head that decides as a head of another form does, and says how nearly."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from mara_integrations.cli import app
from mara_integrations.engine.backends.select import make_backend
from mara_integrations.errors import ConfigError
from mara_integrations.heads.folder import sha256
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.messages import Conversation, Message
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.testing import random_head, tiny_model, tiny_tokenizer
from mara_integrations.training.distil import distil


@pytest.fixture(scope="module")
def model():
    return load_model(ModelSpec((tiny_model(), tiny_tokenizer())))


def prompts(count):
    return [Conversation((Message("user", f"{i} {chr(97 + i % 26)}?"),)) for i in range(count)]


@pytest.mark.parametrize("form", ["residual", "value", "paper"])
def test_it_learns_most_of_what_its_teacher_does(model, form):
    teacher = random_head(32, form, accept_rate=0.5, top_k=6, **({} if form == "paper" else {"scale": 0.3}))

    head, report = distil(teacher, model, make_backend(model.model), prompts(40), max_reply_tokens=8)

    assert isinstance(head, QHead) and head.config.method == "distil" and head.config.top_k == 6
    assert head.config.training["teacher"] == teacher.fingerprint
    assert report.positions > 20 and report.base_kl > 0.02
    assert report.kl < 0.9 * report.base_kl, "it is nearer to its teacher than the base model is"
    assert 0 < report.greedy_agreement <= 1 and 0 < report.sampled_agreement <= 1


def test_a_teacher_that_changes_nothing_is_met_exactly(model):
    teacher = random_head(32, "residual", scale=1e-6)
    _, report = distil(teacher, model, make_backend(model.model), prompts(6), max_reply_tokens=4)
    assert report.kl < 0.02 and report.base_kl < 1e-6
    assert report.sampled_agreement > 0.9


def test_there_must_be_something_to_distil(model):
    backend = make_backend(model.model)
    with pytest.raises(ConfigError, match="of the 'q' form already"):
        distil(random_head(32, "q"), model, backend, prompts(4))
    with pytest.raises(ConfigError, match="1 prompts are too few"):
        distil(random_head(32, "residual"), model, backend, prompts(1))


def test_the_command_writes_a_head_and_says_how_near_it_is(folder_model, prompts_file, tmp_path):
    reward_model = tmp_path / "teacher" / "rewards" / "x.safetensors"
    reward_model.parent.mkdir(parents=True)
    reward_model.write_bytes(b"data")
    spec = {"kind": "reward_model", "name": "x", "file": "rewards/x.safetensors", "sha256": sha256(b"data")}
    teacher = random_head(32, "residual", base_model=folder_model, scale=0.3, top_k=5, rewards=(spec,))
    teacher.save_pretrained(tmp_path / "teacher")
    prompts_file.write_text(prompts_file.read_text().replace("prompt", "ask") + "{\n")
    data = ["--data", str(prompts_file), "--format", "prompts", "--column", "prompt=ask", "--skip-bad-rows"]
    command = ["distil", "--head", str(tmp_path / "teacher"), *data]  # it records its model

    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "q"), "--max-reply-tokens", "6"])

    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"Distilling {tmp_path / 'teacher'} into {tmp_path / 'q'}, from its replies to ")
    assert "\nHeld out at " in result.output and "KL from the teacher" in result.output
    assert "same token" in result.output
    tried = f"  mara-tools eval --head {tmp_path / 'q'} --compare {tmp_path / 'teacher'} --data {prompts_file} "
    assert tried + "--column prompt=ask --format prompts --skip-bad-rows\n" in result.output
    head = MARAHead.from_pretrained(tmp_path / "q")
    assert isinstance(head, QHead)
    assert [kept["file"] for kept in head.config.rewards] == ["rewards/x.safetensors"]
    assert (tmp_path / "q" / "rewards" / "x.safetensors").read_bytes() == b"data", "the reward model comes along"
    metrics = json.loads((tmp_path / "q" / "head_config.json").read_text())["metrics"]
    assert set(metrics["distil"]) == {"positions", "kl", "base_kl", "greedy_agreement", "sampled_agreement"}
    assert torch.isfinite(torch.tensor(metrics["distil"]["kl"]))
