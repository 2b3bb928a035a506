"""`mara-tools recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from mara_integrations.training.recipes import read_recipe, recipe_names


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Recipe whose settings are shown, as a file for train --config.")
    ] = None,
) -> None:
    """List the recipes for train --recipe, or show the settings of one.

    Examples:
      mara-tools recipes
      mara-tools recipes warm
    """
    if name is not None:
        print(read_recipe(name).to_yaml(), end="")
        return
    width = max(map(len, recipe_names()))
    for each in recipe_names():
        print(f"{each:<{width}}  {read_recipe(each).description}")
    first = recipe_names()[0]
    print(f"\nTrain one\n  mara-tools train --recipe {first} --output heads/{first}")
