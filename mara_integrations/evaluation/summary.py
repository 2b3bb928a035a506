"""The figures of an evaluation, for a head's config, its card and the run's metrics."""

from __future__ import annotations

import json
from typing import Any

from mara_integrations.evaluation.metrics import Interval
from mara_integrations.evaluation.results import Evaluation
from mara_integrations.heads.card import Results


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """Return the figures of an evaluation without its examples, as JSON can hold them."""
    whole: dict[str, Any] = json.loads(evaluation.to_json())
    del whole["examples"]
    return whole


def card_results(evaluation: Evaluation) -> Results:
    """Return the table for the head's model card."""
    rows = []
    for name, comparison in evaluation.rewards.items():
        if comparison.base_compliance and comparison.gated_compliance:
            base, gated = _percent(comparison.base_compliance), _percent(comparison.gated_compliance)
            rows.append((f"complies: {name}", base, gated))
        elif comparison.base_mean is not None:
            rows.append((f"mean {name}", f"{comparison.base_mean:+.3f}", f"{comparison.gated_mean:+.3f}"))
        if comparison.preference is not None:
            p = comparison.preference
            rows.append((f"preference rate: {name}", "", f"{p.mean:+.2f} [{p.low:+.2f}, {p.high:+.2f}]"))
    base_side, gated_side = evaluation.base, evaluation.gated
    rows += [
        ("perplexity under the base model", f"{base_side.perplexity:.2f}", f"{gated_side.perplexity:.2f}"),
        ("distinct-2", f"{base_side.distinct_2:.3f}", f"{gated_side.distinct_2:.3f}"),
        ("forwards a token", f"{base_side.forwards_per_token:.2f}", f"{gated_side.forwards_per_token:.2f}"),
    ]
    return Results(len(evaluation.examples), tuple(rows))


def _percent(interval: Interval) -> str:
    return f"{interval.mean:.0%} [{interval.low:.0%}, {interval.high:.0%}]"
