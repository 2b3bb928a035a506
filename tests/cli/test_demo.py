"""`mara-tools demo`, from the wheel: what a person has who installed a package and cloned nothing."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import torch
from commands import run

from mara_integrations.demo import TRAIN
from mara_integrations.testing import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="builds the wheel")
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return zipfile.ZipFile(found)


@pytest.fixture
def demo(wheel, tmp_path):
    """`mara-tools demo` of a Python that has the wheel, what it depends on, and no clone."""
    wheel.extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def run(*arguments):
        command = [sys.executable, "-m", "mara_integrations", "demo", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
        )

    return run


@pytest.fixture
def model_that_says_you(tmp_path):
    """A folder with a tiny model that answers the demo's prompts with "you. you. they. ..." in random order.

    The demo's head learns from replies that hold its forbidden words: a random model would write none of them.
    """
    tokenizer, model = tiny_tokenizer(), tiny_model(max_position_embeddings=2048)
    choose = random.Random(0)
    prompts = [json.loads(line)["prompt"] for line in TRAIN.read_text().splitlines()]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        texts = []
        for prompt in choose.sample(prompts, 4):
            words = " ".join(choose.choice(["you.", "you.", "they."]) for _ in range(12))
            chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": words}]
            texts.append(tokenizer.apply_chat_template(chat, tokenize=False))
        tokenizer.pad_token = tokenizer.eos_token
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path / "says-you"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_wheel_holds_what_runs_without_a_clone(wheel):
    names = set(wheel.namelist())
    for file in ("py.typed", "demo/house_style_train.jsonl", "demo/house_style_test.jsonl", "demo/README.md"):
        assert f"mara_integrations/{file}" in names
    assert "mara_integrations/evaluation/report.html.jinja" in names
    assert not [name for name in names if name.startswith(("tests/", "cookbook/"))]


def test_the_description_on_an_index_has_no_dead_links(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    text = wheel.read(metadata).decode()
    assert "Project-URL: " in text
    assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)]*)\)", text))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_runs_to_its_end(demo, model_that_says_you, tmp_path):
    done = demo("--quick", "--model", model_that_says_you)

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/house-style/head_config.json").exists()
    assert (tmp_path / "runs/house-style/report.html").exists()
    assert "better with the head" in done.stdout
    assert re.search(r"LangChain\s+\S", done.stdout) and re.search(r"LlamaIndex\s+\S", done.stdout)
    assert f"--data {tmp_path / 'installed' / 'mara_integrations' / 'demo'}" in done.stdout


def test_the_demo_refuses_an_unknown_model_before_its_first_step(tmp_path):
    done = run("demo", "--model", "no-such/model", "--output", tmp_path / "head", code=1)
    assert "no-such/model" in done.stderr and "Traceback" not in done.stderr
    assert "1. Train" not in done.stdout


def test_the_demo_ends_where_a_step_fails(folder_model, tmp_path, monkeypatch):
    module = import_module("mara_integrations.cli.demo")  # the package has the function of this name
    monkeypatch.setattr(module, "TRAIN", tmp_path / "gone.jsonl")
    done = run("demo", "--model", folder_model, "--output", tmp_path / "head", code=1)
    assert "gone.jsonl" in done.stderr and "Traceback" not in done.stderr
    assert "1. Train" in done.stdout and "2. Compare" not in done.stdout
