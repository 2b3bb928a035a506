"""Features that have never run on the hardware they are for; each is off until `MARA_EXPERIMENTAL` names it."""

from __future__ import annotations

import os
from typing import Literal, get_args

from mara_integrations.errors import ConfigError

Feature = Literal["cuda-graphs", "gpu-tensor-parallel"]
VARIABLE = "MARA_EXPERIMENTAL"


def is_enabled(feature: Feature) -> bool:
    """Return whether the environment turns an experimental feature on.

    Raises:
        ConfigError: See `enabled_features`.
    """
    return feature in enabled_features()


def enabled_features() -> frozenset[str]:
    """Return the features that `MARA_EXPERIMENTAL` names, separated by commas.

    Raises:
        ConfigError: If a name is unknown.
    """
    allowed = get_args(Feature)
    named = [name.strip() for name in os.environ.get(VARIABLE, "").split(",")]
    for name in named:
        if name and name not in allowed:
            raise ConfigError(
                f"{VARIABLE} names an unknown feature, {name!r}",
                hint=f"allowed, separated by commas: {', '.join(allowed)}",
            )
    return frozenset(filter(None, named))
