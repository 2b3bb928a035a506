"""Recipes: settings of a training run that ship with the package, by name. Each is a YAML file in this folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mara_integrations.data.principles import VARIED_PROMPTS
from mara_integrations.errors import ConfigError
from mara_integrations.sampling import Params

_FOLDER = Path(__file__).parent
# Given anew, these replace each other: the opposite of another sentence is not that of this one.
_SENTENCES = ("principle", "principle_file", "against")


class Recipe(Params):
    """The content of a recipe's file.

    Attributes:
        description: What the head is for, a sentence.
        judged: What the recipe's judges count, in a sentence or two. No training sees them.
        sentence: The same wish as a system prompt, which the head is to beat; None where the principle says it.
        settings: Settings of the run by the names of `TrainConfig`. `data` is a file of the shipped prompts.
    """

    description: str
    judged: str
    sentence: str | None = None
    settings: dict[str, Any]

    @property
    def system_prompt(self) -> str:
        """What an application without the head would put into its system prompt."""
        return self.sentence or str(self.settings["principle"])

    def to_yaml(self) -> str:
        """Return the settings as a file for `--config`, with description and judges as comments."""
        comments = "".join(f"# {line}\n" for line in (self.description, f"Judged by: {self.judged}"))
        return comments + str(yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True, width=100))


def recipe_names() -> list[str]:
    """Return the names of all recipes, sorted."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def read_recipe(name: str) -> Recipe:
    """Return a recipe.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in recipe_names():
        raise ConfigError(f"recipe={name!r} is unknown", hint=f"recipes are {', '.join(recipe_names())}")
    recipe = Recipe.of(**yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))
    if "data" not in recipe.settings:
        return recipe
    data = str(VARIED_PROMPTS.with_name(recipe.settings["data"]))
    return recipe.updated(settings={**recipe.settings, "data": data})


def with_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with those of the recipe that they name, where they say nothing themselves.

    Raises:
        ConfigError: If there is no recipe of that name.
    """
    name = given.get("recipe")
    if name is None:
        return dict(given)
    settings = read_recipe(str(name)).settings
    if any(given.get(sentence) for sentence in _SENTENCES[:2]):
        settings = {key: value for key, value in settings.items() if key not in _SENTENCES}
    return {**settings, **given}
