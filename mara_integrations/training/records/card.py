"""The model card of a trained head: what it was made from, what it does, how to use it."""

from __future__ import annotations

import json
from typing import Any

from mara_integrations.evaluation.evaluate import Evaluation
from mara_integrations.evaluation.metrics import Interval
from mara_integrations.heads.head import HeadConfig


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """The figures of an evaluation without its examples, as JSON can hold them."""
    whole: dict[str, Any] = json.loads(evaluation.to_json())
    del whole["examples"]
    return whole


def model_card(config: HeadConfig, why: str, evaluation: Evaluation | None) -> str:
    """README.md of a head's folder."""
    lines = [
        "---",
        "library_name: mara_integrations",
        f"base_model: {config.base_model}",
        "tags: [mara, alignment]",
        "---",
        "",
        f"# MARA head for {config.base_model}",
        "",
        f"Trained by `{config.method}` because {why}. Form `{config.form}`, strength {config.strength:.3g}, candidates "
        f"top-k {config.top_k}, top-p {config.top_p}, at least {config.min_candidates}. "
        f"Data `{config.data_fingerprint}`.",
        "",
        "```python",
        "from mara_integrations import MARALLM",
        "",
        f'llm = MARALLM(model="{config.base_model}", head="this-folder")',
        "```",
        "",
    ]
    if evaluation is not None:
        lines += [
            f"## On {len(evaluation.examples)} held-out prompts",
            "",
            "| | base model | with this head |",
            "| --- | --- | --- |",
        ]
        for name, comparison in evaluation.rewards.items():
            if comparison.base_compliance and comparison.gated_compliance:
                base, gated = _percent(comparison.base_compliance), _percent(comparison.gated_compliance)
                lines.append(f"| complies: {name} | {base} | {gated} |")
            elif comparison.base_mean is not None:
                lines.append(f"| mean {name} | {comparison.base_mean:+.3f} | {comparison.gated_mean:+.3f} |")
            if comparison.preference is not None:
                p = comparison.preference
                lines.append(f"| preference rate: {name} | | {p.mean:+.2f} [{p.low:+.2f}, {p.high:+.2f}] |")
        base_side, gated_side = evaluation.base, evaluation.gated
        lines += [
            f"| perplexity under the base model | {base_side.perplexity:.2f} | {gated_side.perplexity:.2f} |",
            f"| distinct-2 | {base_side.distinct_2:.3f} | {gated_side.distinct_2:.3f} |",
            f"| forwards a token | {base_side.forwards_per_token:.2f} | {gated_side.forwards_per_token:.2f} |",
            "",
            "Brackets are 95 % intervals. `mara-tools eval` measures the same on prompts of your own.",
            "",
        ]
    if files := [f"`{spec['file']}` ({spec['name']})" for spec in config.rewards if "file" in spec]:
        lines += [
            "## Reward models",
            "",
            f"It was taught and judged by {' and '.join(files)}, as `eval` does again.",
            "",
        ]
    lines += [
        "## Limits",
        "",
        "The head was judged on prompts like those it was trained on; on others it may do nothing, or harm. It changes "
        "which of the base model's own candidates is taken, and can't make it say what it would never say.",
        "",
    ]
    return "\n".join(lines)


def _percent(interval: Interval) -> str:
    return f"{interval.mean:.0%} [{interval.low:.0%}, {interval.high:.0%}]"
