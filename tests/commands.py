"""What tests of `mara-tools` share: its commands called in this process or another, and data for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from mara_integrations.cli import app

ROOT = Path(__file__).parents[1]
VOWELS = f"{ROOT / 'tests' / 'reward_for_tests.py'}:vowels"
PROMPTS = [{"prompt": f"hello {i}"} for i in range(12)]
PAIRS = [{"prompt": f"say {i}", "chosen": "aeiou " * 2, "rejected": "xyz tqk " * 2} for i in range(12)]
QUICK = ("--max-reply-tokens", 8, "--replies-each", 2, "--epochs", 2, "--inner-size", 16)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments, stdin=None, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def generate(*arguments, **options):
    return run("generate", "--model", "model", "--max-new-tokens", 6, *arguments, **options).stdout


def tools(*arguments, **options):
    """A process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mara_integrations", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False, **options)


def refused(*arguments):
    """The one error line, without its label."""
    result = run(*arguments, code=1)
    first, *rest = result.stderr.splitlines()
    assert first.startswith("error: ") and len(rest) <= 1 and all(line.startswith("hint: ") for line in rest)
    assert "Traceback" not in result.output
    return first
