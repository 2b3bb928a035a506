"""How well a score orders held-out replies of different worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich.markup import escape

from mara_integrations.evaluation.metrics import Interval, wilson
from mara_integrations.training.context import Run


def ordered_pairs(
    prompts: Sequence[int], values: Sequence[float], targets: Sequence[float]
) -> list[tuple[float, float]]:
    """The values of a better and a worse reply to one prompt: best against worst, and so inwards.

    Where every prompt has one reply, all replies are taken together.

    Args:
        prompts: That each reply answers.
        values: What is thought of each reply.
        targets: What each reply was worth.
    """
    by_prompt: dict[int, list[tuple[float, float]]] = {}
    for prompt, value, target in zip(prompts, values, targets, strict=True):
        by_prompt.setdefault(prompt, []).append((target, value))
    if all(len(group) == 1 for group in by_prompt.values()):
        by_prompt = {0: [item for group in by_prompt.values() for item in group]}
    return [
        (better[1], worse[1])
        for group in by_prompt.values()
        for better, worse in zip(sorted(group)[::-1], sorted(group), strict=True)
        if better[0] > worse[0]
    ]


def held_out_ordering(
    run: Run, prompts: Sequence[int], values: Sequence[float], targets: Sequence[float]
) -> Interval | None:
    """Share of held-out pairs to one prompt that the values order as the targets do; see `ordered_pairs`."""
    pairs = ordered_pairs(prompts, values, targets)
    if not pairs:
        return None
    right = sum(better > worse for better, worse in pairs)
    accuracy = wilson(right, len(pairs))
    run.log("held-out accuracy", pairs=len(pairs), accuracy=asdict(accuracy))
    interval = f"{accuracy.mean:.2f} [{accuracy.low:.2f}, {accuracy.high:.2f}]"
    doubt = " [yellow]not distinguishable from chance[/]" if accuracy.low <= 0.5 else ""
    run.say(f"  {right} of {len(pairs)} held-out pairs are ordered rightly: {escape(interval)}{doubt}")
    return accuracy
