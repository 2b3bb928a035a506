"""Several heads as one: their corrections of the base model add, each with its weight.

Heads of the `q` form come first: they change the base model's probabilities, and with them the hazards that the other
forms correct.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any, TypeAlias

from mara_integrations.errors import ConfigError, HeadError
from mara_integrations.heads.afterstate import AfterstateHead
from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead


class ComposedHead:
    """Several heads as one: their corrections of the base model's hazard add.

    Args:
        weights: Factor of each head's correction, above 0, beside the scale that its own calibration
            recorded; at least one head.

    Attributes:
        parts: Each head, and the factor of its score.
        config: Config of the sum; it lists the rewards of all parts.

    Raises:
        ConfigError: If a head is of the `paper` form, which can't be added to others.
        HeadError: If the heads are of different widths.
    """

    def __init__(self, weights: Mapping[MARAHead, float]) -> None:
        first = next(iter(weights)).config
        for head, weight in weights.items():
            assert 0 < weight < math.inf
            if head.config.form == "paper":
                raise ConfigError(
                    "a 'paper' head can be neither weighed nor composed: its accept probability replaces the base "
                    "model's instead of correcting it, so there is nothing to add",
                    hint="heads of the 'residual', 'value' and 'q' form add",
                )
            if head.config.hidden_size != first.hidden_size:
                raise HeadError(
                    "heads of different widths can't be composed: "
                    f"they expect hidden sizes {first.hidden_size} and {head.config.hidden_size}"
                )
        self.parts = {head: weight * head.config.scale for head, weight in weights.items()}
        self.config = HeadConfig(
            form="q" if all(isinstance(head, QHead) for head in weights) else "residual",
            hidden_size=first.hidden_size,
            method="composition",
            rewards=tuple(reward for head in self.parts for reward in head.config.rewards),
        )


Head: TypeAlias = MARAHead | ComposedHead


def q_parts(head: Head) -> dict[QHead, float]:
    """The parts that score candidates by the state before them, and their factors."""
    return {part: factor for part, factor in head.parts.items() if isinstance(part, QHead)}


def afterstate_parts(head: Head) -> dict[AfterstateHead, float]:
    """The parts that need every candidate fed, and their factors."""
    return {part: factor for part, factor in head.parts.items() if isinstance(part, AfterstateHead)}


def greedy_settings(head: Head, top_p: float) -> dict[str, float]:
    """Return `strength` and `top_p` of greedy requests that name no strength: of several heads the smallest.

    Args:
        head: One head, or several as one.
        top_p: That of the request, which holds if it is smaller.
    """
    configs = [part.config for part in head.parts]
    return {
        "strength": min(config.greedy_strength for config in configs),
        "top_p": min([top_p, *(config.greedy_top_p for config in configs if config.greedy_top_p is not None)]),
    }


def trained_settings(head: Head, given: Container[str]) -> dict[str, Any]:
    """Return what a head was trained with: `top_k`, `top_p`, `min_candidates` and `system_prompt`.

    `min_candidates` is the largest of the parts: a head that needs an alternative gets one, and the others can pass it
    over. `top_k` and `top_p` decide which candidates are judged at all, so there is no compromise between different
    ones. Parts that were trained without a system prompt accept any.

    Args:
        head: One head, or several as one.
        given: Names of settings that the request sets itself: parts may differ in these.

    Raises:
        ConfigError: If the parts were trained with different `top_k`, `top_p` or `system_prompt`, and it is not given.
    """
    configs = [part.config for part in head.parts]
    trained: dict[str, Any] = {"min_candidates": max(config.min_candidates for config in configs)}
    for name in ("top_k", "top_p", "system_prompt"):
        values = list(dict.fromkeys(value for config in configs if (value := getattr(config, name)) is not None))
        if len(values) > 1 and name not in given:
            raise ConfigError(
                f"the heads were trained with different {name}: {' and '.join(map(repr, values))}",
                hint=f"give one for their composition, as {name}={values[0]!r}",
            )
        if values:
            trained[name] = values[0]
    return trained
