"""`mara-tools recipes`, and `train --recipe`."""

from __future__ import annotations

import pytest
import yaml
from commands import refused, run

from mara_integrations.training.recipes import read_recipe, recipe_names

pytestmark = pytest.mark.usefixtures("in_the_folder")


def test_all_are_listed_with_what_they_are_for():
    *lines, empty, title, command = run("recipes").stdout.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(line.endswith(read_recipe(line.split()[0]).description) for line in lines)
    assert (empty, title) == ("", "Train one") and command.startswith("  mara-tools train --recipe concise")


def test_one_is_shown_as_a_file_for_train():
    said = run("recipes", "warm").stdout
    assert said.startswith("# Friendly") and yaml.safe_load(said) == read_recipe("warm").settings


@pytest.mark.parametrize("command", [("recipes", "wram"), ("train", "--recipe", "wram", "--output", "never")])
def test_an_unknown_one_is_refused_in_one_line(command):
    assert refused(*command) == "error: recipe='wram' is unknown"
    assert "hint: recipes are concise, formal, " in run(*command, code=1).stderr


def test_a_recipe_needs_no_data_and_options_go_first():
    flags = ("train", "--recipe", "formal", "--output", "dry", "--model", "model", "--dry-run")
    small = ("--max-replies", 8, "--max-reply-tokens", 6, "--eval-prompts", 2)
    said = run(*flags, *small, "--contrast", "neutral").stdout
    assert "Recipe formal: Replies in the language of a business letter." in said
    assert "Sentence You write formally" in said and "Opposite" not in said
    assert "Opposite You write casually" in run(*flags, *small).stdout
