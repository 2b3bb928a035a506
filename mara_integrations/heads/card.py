"""The model card of a head: what it was made from, what it does, how to use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mara_integrations.heads.config import HeadConfig


@dataclass(frozen=True, slots=True)
class Results:
    """The table of a card.

    Attributes:
        num_prompts: Held-out prompts that were measured on.
        rows: Name of a measure, its value for the base model, its value with the head.
    """

    num_prompts: int
    rows: tuple[tuple[str, str, str], ...]


def model_card(config: HeadConfig, *, why: str | None = None, results: Results | None = None) -> str:
    """Return the README.md of a head's folder.

    Args:
        config: The head's config.
        why: Why the training method was chosen, as a clause after "because"; None when unknown.
        results: Measures on held-out prompts; None when there are none.
    """
    base = config.base_model or "unknown"
    lines = [
        "---",
        "library_name: mara_integrations",
        f"base_model: {base}",
        "tags: [mara, alignment]",
        "---",
        "",
        f"# MARA head for {base}",
        "",
        f"Form `{config.form}` for hidden states of width {config.hidden_size}, scale {config.scale:.3g}, candidates "
        f"top-k {config.top_k}, top-p {config.top_p:g}, at least {config.min_candidates}; in greedy decoding strength "
        f"{config.greedy_strength:.3g} and top-p {config.greedy_top_p or config.top_p:.3g}.",
    ]
    if config.method is not None:
        lines.append(f"Trained by `{config.method}`{f' because {why}' if why else ''}.")
    if recipe := config.training.get("recipe"):
        lines.append(f"Its settings are those of the recipe `{recipe}`, but for what the command below names.")
    if config.principle is not None:
        lines += ["", "It was made of this sentence:", "", *_quoted(config.principle)]
        if config.teacher is None and (contrast := config.metrics.get("contrast")):
            lines += ["", f"It learned what the sentence changes against {contrast}."]
    if config.teacher is not None:
        lines += ["", _taught(config)]
    if said := config.metrics.get("missing_answer"):
        lines += ["", "It learned what documents in a prompt change and, where they hold no answer, to say:"]
        lines += ["", *_quoted(said)]
    if config.system_prompt is not None:
        lines += ["", "Trained with this system prompt; use it too:", "", *_quoted(config.system_prompt)]
    if config.origin is not None:
        came_from = config.origin
        versions = ", ".join(f"{name} {version}" for name, version in came_from.versions.items())
        lines += [
            "",
            f"Data: `{came_from.data}`, {came_from.num_rows} rows to fit on, {came_from.num_held_out_rows} held out. "
            f"Trained on {came_from.date} with {versions}:",
            "",
            *_indented(came_from.command),
        ]
    if config.data_fingerprint is not None:
        lines += ["", f"Hash of the training data: `{config.data_fingerprint}`."]
    lines += [
        "",
        "```python",
        "from mara_integrations import MARALLM",
        "",
        f'llm = MARALLM(model="{base}", head="this-folder")',
        "```",
        "",
    ]
    if results is not None:
        lines += [
            f"## On {results.num_prompts} held-out prompts",
            "",
            "| | base model | with this head |",
            "| --- | --- | --- |",
            *(f"| {name} | {base_value} | {gated} |" for name, base_value, gated in results.rows),
            "",
            "Brackets are 95 % intervals. `mara-tools eval` measures the same on prompts of your own.",
            "",
        ]
    lines += _beside_the_prompt(config.metrics.get("prompt_baseline"))
    if files := [f"`{spec['file']}` ({spec['name']})" for spec in config.rewards if "file" in spec]:
        lines += [
            "## Reward models",
            "",
            f"The head was trained and judged by {' and '.join(files)}. `mara-tools eval` uses the same.",
            "",
        ]
    if config.method is not None:
        lines += [
            "## Limits",
            "",
            "The head was judged on prompts like those it was trained on. On others it may do nothing, or harm. It "
            "changes which of the base model's own candidates is taken; it can't make the model say what the model "
            "would never say.",
            "",
        ]
    return "\n".join(lines)


def _taught(config: HeadConfig) -> str:
    """Return a paragraph about the teacher of a head."""
    tuned = "" if config.teacher_base is None else f", which was tuned from `{config.teacher_base}`"
    under = "" if config.principle is None else " under the sentence"
    contrast = config.metrics.get("contrast", "the base model")
    text = (
        f"Its teacher is `{config.teacher}`{tuned}. It learned what the teacher makes of the base model's own "
        f"replies{under}, against {contrast}."
    )
    if agreement := config.metrics.get("teacher_agreement"):
        text += (
            f" On {agreement['num_prompts']} held-out prompts, the teacher's log-probabilities of replies less those "
            f"that they are compared with are {agreement['base']:+.3f} nats a token for the base model, and "
            f"{agreement['head']:+.3f} with this head."
        )
    return text


def _beside_the_prompt(baseline: dict[str, Any] | None) -> list[str]:
    """Return the table of a head beside the sentence as a system prompt; nothing where it was not measured."""
    if not baseline:
        return []
    judges = list(baseline["rows"][0]["judges"])
    names = ["", "agreement, nats a token", "perplexity", "distinct-2", *(f"{judge}, preferred" for judge in judges)]
    lines = [
        f"## Beside the sentence as a system prompt, on {baseline['num_prompts']} held-out prompts",
        "",
        f"| {' | '.join(names)} |",
        f"| {' | '.join(['---'] * len(names))} |",
    ]
    for row in baseline["rows"]:
        judged = [f"{mean:+.3f}, {rate:+.2f}" for mean, rate in row["judges"].values()]
        cells = [
            f"{row['replies']}, {row['decoding']}",
            f"{row['agreement']:+.3f}",
            f"x {row['perplexity_ratio']:.2f}",
            f"x {row['distinct_2_ratio']:.2f}",
            *judged,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    explained = "Agreement is the mean of log p(token \\| sentence) - log p(token) over the replies' tokens."
    return [*lines, "", explained, ""]


def _quoted(text: str) -> list[str]:
    """Return a text as a quote in Markdown."""
    return [f"> {line}".rstrip() for line in text.splitlines()]


def _indented(text: str) -> list[str]:
    """Return a text as a block of code in Markdown."""
    return [f"    {line}".rstrip() for line in text.splitlines()]
