"""Help and usage errors of every command: they fit 80 columns, name everything whole, and cost no import of torch."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mara_integrations.cli import app
from mara_integrations.cli.help import Command, split_examples

ROOT = Path(__file__).parents[2]
GROUP = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)
FLAGS = re.MULTILINE | re.DOTALL


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


def shown(*arguments):
    result = CliRunner().invoke(app, [*arguments, "--help"])
    assert result.exit_code == 0, result.output
    return result.stdout


def options_of(name):
    return [option for parameter in GROUP.commands[name].params for option in parameter.opts if option[:2] == "--"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_eighty_columns_and_names_every_option_whole(name):
    said = shown(name)
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said and "needed)" not in said
    for option in options_of(name):
        assert re.search(rf"{option}(?![\w-])", said), f"{option} is not shown whole"


@pytest.mark.parametrize(("name", "choices"), [("train", "auto, value, dpo, kto,"), ("eval", "auto, pairs, labelled,")])
def test_choices_are_listed_in_the_text_where_no_word_is_broken(name, choices):
    said = shown(name)
    assert f"One of {choices}" in " ".join(said.split()) and "|" not in said
    assert not re.search(r"\w-$", said, re.MULTILINE), "no name is broken at its hyphen"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_two_examples_that_the_command_understands(name):
    command = GROUP.commands[name]
    assert isinstance(command, Command)
    _, examples = split_examples(command.help)
    assert len(examples) == 2 and shown(name).rstrip().endswith(examples[1])
    for example in examples:
        program, *words = shlex.split(example.partition(" < ")[0])
        assert (program, words[0]) == ("mara-tools", name)
        command.make_context(name, words[1:]).close()


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_command_needs_is_called_required(name):
    said = shown(name)
    for parameter in GROUP.commands[name].params:
        if parameter.required:
            names = [parameter.metavar, parameter.name] if parameter.param_type_name == "argument" else parameter.opts
            either = "|".join(re.escape(word) for word in names if word)
            row = re.search(rf"^  ({either})(?=\W).*?(?=^  \S|^\S)", said, FLAGS)
            assert row is not None and "[required]" in row[0]


def test_the_list_of_commands_shows_each_with_a_whole_sentence():
    said = shown()
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\S.*[^.…]$", said, re.MULTILINE)
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["generate", "hi", "--max-token", "5"], "no such option: --max-token", "did you mean --max-new-tokens"),
        (["chat", "--temprature", "1"], "no such option: --temprature", "did you mean --temperature?"),
        (["--vresion"], "no such option: --vresion", "did you mean --version"),
        (["trian"], "no such command 'trian'", "did you mean train?"),
        (["generate"], "missing argument 'prompt'", "`mara-tools generate --help` lists what there is"),
        (["inspect", "a", "b"], "got unexpected extra argument", "`mara-tools inspect --help`"),
        (["generate", "hi", "--top-k", "x"], "invalid value for '--top-k': 'x' ", "`mara-tools generate --help`"),
        (["serve", "--port", "99999"], "invalid value for '--port': '99999' ", "`mara-tools serve --help`"),
        (["chat", "--engine", "tpu"], "invalid value for '--engine': 'tpu' is not one of", "`mara-tools chat --help`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_on_the_command_line_is_one_line_and_a_hint(arguments, error, hint):
    said = CliRunner().invoke(app, arguments, prog_name="mara-tools")
    first, second = said.stderr.splitlines()
    assert said.exit_code == 2
    assert first.startswith(f"error: {error}") and second.startswith(f"hint: {hint}")


def test_a_missing_extra_is_named_before_anything_slow_is_imported(monkeypatch):
    program = (
        "import sys, importlib.util\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'uvicorn' else found(name, *more)\n"
        "from mara_integrations.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print('torch' in sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, "-c", program, "serve"], capture_output=True, text=True, env=environment)
    assert said.stderr.splitlines() == [
        "error: this command needs the package uvicorn",
        "hint: pip install 'mara-integrations[serve]'",
    ]
    assert said.stdout == "False\n"
