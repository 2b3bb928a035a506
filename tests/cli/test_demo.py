"""`mara-tools demo`, from the wheel: what a person has who installed a package and cloned nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
def python(wheel, tmp_path):
    """A Python that has the wheel, what it depends on, and no clone."""
    wheel.extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "2", "COLUMNS": "200"}

    def run(*arguments):
        command = [sys.executable, "-m", "mara_integrations", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
        )

    return run


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
@pytest.mark.skipif("MARA_TEST_DEMO" not in os.environ, reason="takes minutes; MARA_TEST_DEMO=1 runs it")
def test_the_demo_runs_to_its_end(python, tmp_path):
    done = python("demo", "--quick")

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/house-style/head_config.json").exists()
    assert (tmp_path / "runs/house-style/report.html").exists()
    assert re.search(r"LangChain\s+\S", done.stdout) and re.search(r"LlamaIndex\s+\S", done.stdout)
    assert f"--data {tmp_path / 'installed' / 'mara_integrations' / 'demo'}" in done.stdout


def test_the_demo_ends_where_a_step_fails(python, tmp_path):
    done = python("demo", "--model", "no-such/model")
    assert done.returncode == 1
    assert "no-such/model" in done.stderr and "Traceback" not in done.stderr
    assert "2. Compare" not in done.stdout
