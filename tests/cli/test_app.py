"""What all commands of `mara-tools` share: the start, mistakes in the command line, and errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from commands import ROOT, run, tools
from typer.testing import CliRunner

from mara_integrations import __version__
from mara_integrations.cli import app
from mara_integrations.runtime import MARAEngine

pytestmark = pytest.mark.usefixtures("in_the_folder")


def test_help_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from mara_integrations.cli import main\n"
        "for sys.argv[1:] in (['--help'], ['train', '--help'], ['--version']):\n"
        "    try:\n        main()\n"
        "    except SystemExit:\n"
        "        heavy = {'torch', 'transformers', 'langchain_core', 'llama_index', 'numpy'} & set(sys.modules)\n"
        "        print('heavy:', sorted(heavy))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert [line for line in said.stdout.splitlines() if "heavy:" in line] == ["heavy: []"] * 3, said.stderr


def test_the_version_is_the_packages_and_python_m_is_mara_tools():
    assert tools("--version").stdout == f"mara-tools {__version__}\n"


def test_a_usage_error_has_exit_code_2():
    assert "--nonsense" in run("generate", "hi", "--nonsense", code=2).stderr
    assert "--data" in run("train", "--output", "x", code=2).stderr


def test_a_traceback_comes_only_with_debug_which_may_stand_anywhere():
    for arguments in (["--debug", "generate", "hi"], ["generate", "hi", "--debug"]):
        result = CliRunner().invoke(app, [*arguments, "--model", "absent/model"])
        assert result.exit_code == 1 and type(result.exception).__name__ == "ModelError"


def test_an_unexpected_error_is_one_line_too(monkeypatch):
    def stream(self, prompt, **_):
        raise RuntimeError("no\nluck")

    monkeypatch.setattr(MARAEngine, "stream", stream)
    result = run("generate", "hi", "--model", "model", code=1)
    assert result.stderr == "error: unexpected RuntimeError: no luck\nhint: run again with --debug to see where\n"
