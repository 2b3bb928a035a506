"""Adds to a contrast what the prompts themselves change, so that replies differ as much as their prompts do.

A manner that is the same for every prompt asks for the same phrases in every reply. The base model reads its replies
once more, each after another prompt. The log-probability of a candidate after its own prompt, less that after the
other one, is added to what the contrast says of it.

Source: Li et al. 2016 (arXiv 1510.03055), who find replies that tell more about what was asked for by the same
difference, against replies that fit everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mara_integrations.messages import Conversation
from mara_integrations.training.context import Run
from mara_integrations.training.methods.readings import Side, as_generated, difference_of, read_as

# Share of the contrast's standard deviation, chosen on held-out replies of SmolLM2-135M; see the cookbook.
_WEIGHT = 0.5


def with_prompts(run: Run, sides: Sequence[Side], values: Sequence[Tensor]) -> list[Tensor]:
    """Return what a contrast and the prompts say of each candidate together, one tensor (P, K) for each side.

    Args:
        run: The run.
        sides: The replies, to at least two different prompts a side.
        values: What the contrast says of each candidate, in standard deviations, one tensor (P, K) for each side.
    """
    sums = []
    for side, value in zip(sides, values, strict=True):
        elsewhere = read_as(run, side, "after another prompt", exchanged(side.prompts))
        of_prompts = difference_of(side, {"after their own prompts": (as_generated(side), 1.0)}, [elsewhere])
        sums.append(value + _WEIGHT * of_prompts.values)
    return sums


def exchanged(prompts: Sequence[Conversation]) -> list[Conversation]:
    """Return the next different prompt for each; at least two have to differ."""
    others: list[Conversation] = []
    for index, prompt in enumerate(prompts):
        following = (*prompts[index + 1 :], *prompts[:index])
        others.append(next(other for other in following if other != prompt))
    return others
