"""README and cookbook do what they say: their code is run, on the real model; a stand-in head where none is trained."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no tomllib")
else:
    import tomllib
from serving import serving
from typer.testing import CliRunner

from mara_integrations.runtime import MARAEngine
from mara_integrations.server import create_app
from mara_integrations.testing import random_head

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(python|console)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SERVED = "http://127.0.0.1:8000"
COMMANDS = [
    line[2:] for language, code in BLOCKS if language == "console" for line in code.splitlines() if line[:2] == "$ "
]


@pytest.fixture
def workplace(embedded, tmp_path, monkeypatch):
    """A folder as the README's reader has it."""
    monkeypatch.chdir(tmp_path)
    random_head(576, "residual", scale=0.05).save_pretrained("runs/house-style")
    rows = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": f"You said {i}!"} for i in range(12)]
    Path("prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("other-prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Count to {i}."}) + "\n" for i in range(3)))
    Path("rewards.py").write_text(next(code for code in PYTHON if "def short" in code))
    monkeypatch.syspath_prepend(tmp_path)
    loop = asyncio.new_event_loop()  # LlamaIndex takes the current one, and closes none
    asyncio.set_event_loop(loop)
    yield tmp_path
    sys.modules.pop("rewards", None)
    asyncio.set_event_loop(None)
    loop.close()


def test_the_first_commands_are_those_of_a_clone():
    first = re.search(r"```(?:sh|console)\n(.*?)```", README, re.DOTALL)
    assert first is not None and [line.split("#")[0].strip() for line in first[1].splitlines()] == [
        "make demo",
        "make test",
    ]


def test_a_first_user_installs_packages_and_runs_the_demo():
    installing, *_, demo = (command.split("#")[0].split() for command in COMMANDS[:3])
    assert installing[:3] == ["pip", "install", "'mara-integrations[embedded]'"] and demo == ["mara-tools", "demo"]


def test_links_work_wherever_the_readme_is_shown():
    links = re.findall(r"\]\(([^)]*)\)", README)
    assert links and all(link.startswith("https://") for link in links)


def test_named_files_are_there():
    for path in re.findall(r"`((?:cookbook|benchmarks|mara_integrations)/[\w/.]*)`", README):
        assert (ROOT / path).exists(), path
    for script in re.findall(r"^\| `(\d\d_\w+\.py)` \|", README, re.MULTILINE):
        assert (ROOT / "cookbook" / script).exists(), script


def test_every_extra_has_a_row():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    table = README[README.index("| extra | brings |") : README.index("From a clone, `make demo` and")]
    rows = set(re.findall(r"`([a-z-]+)`(?=[^|]*\|[^|]*\|$)", table, re.MULTILINE))
    assert set(declared) - {"dev", "test"} <= rows
    assert "ray" not in declared["all"][0], "a laptop needs none"


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[0])
def test_python_blocks_run(code, workplace, capsys):
    with ExitStack() as opened:
        if SERVED in code:
            heads = {"brand": "runs/house-style"}
            port = opened.enter_context(serving(create_app(MARAEngine("smollm2"), heads, name="smollm2")))
            code = code.replace(SERVED, f"http://127.0.0.1:{port}")
        run(code, capsys)


def run(code, capsys):
    code = re.sub(r"\b(max_(?:new_)?tokens)=\d+", r"\1=8", code)  # longer replies show nothing more
    quick = "max_replies=8, max_reply_tokens=8, epochs=2, rounds=0, eval_prompts=0"
    code = code.replace("TrainConfig(", f"TrainConfig({quick}, ")
    exec(compile(code, "README.md", "exec"), {})
    assert "def " in code or capsys.readouterr().out.strip(), "an example shows something"


@pytest.mark.slow
def test_commands_run_one_after_the_other(workplace):
    from mara_integrations.cli import app

    for command in COMMANDS[3:]:
        program, *arguments = shlex.split(command)
        assert program == "mara-tools"
        if arguments[0] == "train":
            arguments += ["--max-reply-tokens", "8", "--epochs", "3", "--eval-prompts", "2"]
        elif arguments[0] == "eval":
            arguments += ["--max-new-tokens", "8", "--limit", "2"]
        elif arguments[0] in ("explain", "generate"):
            arguments += ["--max-new-tokens", "8"]
        result = CliRunner().invoke(app, arguments, input="/exit\n")
        assert result.exit_code == 0, f"{command}\n{result.output}"
    assert Path("report.html").stat().st_size > 1000 and Path("heads/brand-voice/head.safetensors").exists()
