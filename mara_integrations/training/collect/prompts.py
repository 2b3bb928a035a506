"""The prompts of a run, as the model gets them."""

from __future__ import annotations

import math
from collections.abc import Callable

from mara_integrations.data import Dataset, Row
from mara_integrations.messages import Conversation
from mara_integrations.training.context import Run

_FEWEST_HELD_OUT = 8  # prompts


def conversation(run: Run, row: Row) -> Conversation:
    """Return the prompt of a row with its tools and the run's system prompt."""
    return Conversation(row.prompt, row.tools).with_system(run.config.system_prompt)


def distinct_prompts(run: Run, data: Dataset, is_kept: Callable[[Row], bool] | None = None) -> list[Conversation]:
    """Return the prompts of data in order, each once; those of some rows alone where `is_kept` says which."""
    rows = data.rows if is_kept is None else filter(is_kept, data.rows)
    return list(dict.fromkeys(conversation(run, row) for row in rows))


def limited_prompts(
    run: Run, data: Dataset, replies_per_prompt: int = 1, is_kept: Callable[[Row], bool] | None = None
) -> list[Conversation]:
    """Return as many prompts as `max_replies` allows, chosen by the seed; of held-out ones a share of that."""
    prompts, most = distinct_prompts(run, data, is_kept), max(1, run.max_replies // replies_per_prompt)
    if data is run.plan.held_out or data is run.plan.prompts[1]:
        most = max(_FEWEST_HELD_OUT, math.ceil(most * run.config.held_out))
    if len(prompts) <= most:
        return prompts
    run.say(f"  using {most} of {len(prompts)} prompts (--max-replies)")
    return run.random().sample(prompts, most)


def replies_per_prompt(run: Run) -> int:
    """Return the number of replies to each prompt: a setting, or as many as `max_replies` allows, at most 4."""
    num_prompts = len(distinct_prompts(run, run.plan.prompts[0]))
    return run.config.replies_each or max(1, min(4, run.max_replies // num_prompts))
