"""README and cookbook do what they say: their code is run, on the real model; a stand-in head where none is trained."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mara_integrations.testing import random_head

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```(python|console)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line[2:] for language, code in BLOCKS if language == "console" for line in code.splitlines() if line[:2] == "$ "
]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder as the README's reader has it."""
    monkeypatch.chdir(tmp_path)
    random_head(576, "residual", scale=0.05).save_pretrained("runs/house-style")
    rows = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": f"You said {i}!"} for i in range(24)]
    Path("prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("rewards.py").write_text(next(code for code in PYTHON if "def short" in code))
    loop = asyncio.new_event_loop()  # LlamaIndex takes the current one, and closes none
    asyncio.set_event_loop(loop)
    yield tmp_path
    asyncio.set_event_loop(None)
    loop.close()


def test_the_first_two_commands_are_demo_and_test():
    assert [command.split()[:2] for command in COMMANDS[:2]] == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[0])
def test_python_blocks_run(code, workplace, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert "def " in code or capsys.readouterr().out.strip(), "an example shows something"


def test_commands_run_one_after_the_other(workplace):
    from mara_integrations.cli import app

    for command in COMMANDS[2:]:
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_runs_to_its_end(tmp_path, capfd):
    spec = importlib.util.spec_from_file_location("demo", ROOT / "cookbook" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    few = ("--max-replies", "12", "--correction-rounds", "0", "--epochs", "6", "--max-reply-tokens", "16")
    demo.main(str(tmp_path / "head"), *few, eval_prompts=4)
    out = capfd.readouterr().out
    assert (tmp_path / "head" / "report.html").exists() and "complies" in out
    assert re.search(r"LangChain\s+\S", out) and re.search(r"LlamaIndex\s+\S", out)
