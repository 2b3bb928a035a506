"""A weighted sum of rewards, each normalised first if asked for."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mara_integrations.errors import ConfigError
from mara_integrations.rewards.protocol import Reward, reward_name, takes_partial_text
from mara_integrations.rewards.scoring import Scores

_ENOUGH = 8  # opinions that a scale is taken from: the two replies a reward is tried on are none


class CombinedReward:
    """The weighted sum of the scores of several rewards; rewards without an opinion are left out.

    Args:
        weighted: The rewards and their weights; a negative one turns a reward into a penalty.
        normalise: Scale each part to mean 0 and deviation 1 first. The scale comes from the first batch that is large
            enough, and is kept, so that scores of later batches are comparable.

    Attributes:
        scales: Mean and deviation of each part, once they are known.

    Raises:
        ConfigError: If there is no reward, or a weight is 0.
    """

    def __init__(self, weighted: Sequence[tuple[Reward, float]], *, normalise: bool = False) -> None:
        if not weighted:
            raise ConfigError("there is no reward to combine", hint="give at least one")
        self._parts: dict[str, tuple[Reward, float]] = {}
        for reward, weight in weighted:
            if weight == 0:
                raise ConfigError(f"reward {reward_name(reward)!r} has weight 0", hint="leave it out")
            name = base = reward_name(reward)
            while name in self._parts:  # two of one name are told apart
                name = f"{base} ({len(self._parts) + 1})"
            self._parts[name] = reward, weight
        self.normalise = normalise
        self.scales: dict[str, tuple[float, float]] = {}
        self.__name__ = " + ".join(
            name if weight == 1 else f"{weight:g} × {name}" for name, (_, weight) in self._parts.items()
        )

    @property
    def weighted(self) -> list[tuple[Reward, float]]:
        """Return the rewards with their weights."""
        return list(self._parts.values())

    @property
    def parts(self) -> Mapping[str, Reward]:
        """Return the rewards by name."""
        return {name: reward for name, (reward, _) in self._parts.items()}

    def replaced(self, replace: Callable[[Reward], Reward]) -> CombinedReward:
        """Return the same sum of other rewards, each made from a part."""
        weighted = [(replace(reward), weight) for reward, weight in self._parts.values()]
        return CombinedReward(weighted, normalise=self.normalise)

    @property
    def takes_partial_text(self) -> bool:
        """Whether all parts can score unfinished replies."""
        return all(map(takes_partial_text, self.parts.values()))

    def combine(self, parts: Mapping[str, Scores]) -> Scores:
        """Return one score a reply from the scores of the parts; None if no part has an opinion."""
        if self.normalise:
            parts = {name: self._scaled(name, scores) for name, scores in parts.items()}
        totals: Scores = []
        for given in zip(*(parts[name] for name in self._parts), strict=True):
            opinions = [(w, s) for (_, w), s in zip(self._parts.values(), given, strict=True) if s is not None]
            totals.append(sum(weight * score for weight, score in opinions) if opinions else None)
        return totals

    def _scaled(self, name: str, scores: Scores) -> Scores:
        opinions = [score for score in scores if score is not None]
        if name not in self.scales and len(opinions) >= _ENOUGH:
            self.scales[name] = statistics.fmean(opinions), statistics.pstdev(opinions) or 1.0
        mean, deviation = self.scales.get(name, (0.0, 1.0))
        return [None if score is None else (score - mean) / deviation for score in scores]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse a direct call: the parts may need different arguments, which `score` passes to each."""
        raise TypeError("a CombinedReward is asked by `score`")

    def spec(self, describe: Callable[[Reward], dict[str, Any]]) -> dict[str, Any]:
        """Return the JSON description that `reward_from_spec` builds an equal reward from."""
        parts = [{"reward": describe(reward), "weight": weight} for reward, weight in self._parts.values()]
        return {"kind": "combined", "parts": parts, "normalise": self.normalise}
