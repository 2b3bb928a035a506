"""Reports of an evaluation: their rows and sentences, an HTML page of one file, JSON for other programs.

Whatever a model wrote is shown as text, never interpreted. `console` prints the same in a terminal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from mara_integrations.engine.generation import GateStats
from mara_integrations.errors import ConfigError
from mara_integrations.evaluation.head_comparison import HeadComparison
from mara_integrations.evaluation.marks import Mark, Rejected
from mara_integrations.evaluation.metrics import Interval
from mara_integrations.evaluation.provenance import Provenance
from mara_integrations.evaluation.results import Comparison, Evaluation, Example
from mara_integrations.evaluation.text import score_text, struck_text, visible
from mara_integrations.files import check_writable, write_atomically

FORMATS = (".html", ".json")

MOST_REJECTED = 3  # shown before one token; a reply must stay readable
_MOST_REGRESSIONS = 5

FOOTNOTE = (
    "In brackets: 95 % intervals, Wilson's for shares, a bootstrap over prompts for differences between the two sides. "
    "An interval without width says that all prompts agree, not that there are enough of them. "
    "Speed depends on the machine and its load."
)
# Every word that the table and the line below it use, by the beginning or the end of a measure.
GLOSSARY = {
    "complies": "share of replies that the reward scores 1",
    "mean": "mean score of the reward",
    "preference": "(wins - losses) / prompts: how much more often the gated reply scores higher than lower; -1 to 1",
    "fine replies changed": (
        "of the base replies that were fine already (score 1, or at least the median), the share that the head changed "
        "all the same; an edit there can only harm"
    ),
    "perplexity": "how unlikely the replies are to the base model itself; much above × 1 means less fluent text",
    "distinct-2": "distinct pairs of tokens over all pairs: low where replies repeat themselves",
    "forwards a token": "tokens the model is run on for one token of a reply; what exceeds 1 is the cost of the gate",
    "accepted": "the head let the candidate pass",
    "forced": "all candidates before it were rejected, so the last one was taken",
    "fallback": "all candidates were rejected, and the gate's fallback was taken",
    "single": "there was one candidate, so the head was not asked",
}


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """One measure, in words and numbers ready to show."""

    measure: str
    base: str
    gated: str
    change: str


def summary_rows(evaluation: Evaluation) -> list[SummaryRow]:
    """Return the rows of the table that every form of the report shows."""
    base, gated = evaluation.base, evaluation.gated
    rows = [row for name, comparison in evaluation.rewards.items() for row in _reward_rows(name, comparison)]
    return [
        *rows,
        SummaryRow(
            "perplexity under the base model",
            f"{base.perplexity:.2f}",
            f"{gated.perplexity:.2f}",
            f"× {_interval(evaluation.perplexity_ratio, '.2f')}",
        ),
        SummaryRow("distinct-2", f"{base.distinct_2:.3f}", f"{gated.distinct_2:.3f}", ""),
        SummaryRow("tokens a reply", f"{base.mean_length:.1f}", f"{gated.mean_length:.1f}", ""),
        SummaryRow("replies that came to an end", f"{base.ended:.0%}", f"{gated.ended:.0%}", ""),
        SummaryRow(
            "forwards a token",
            f"{base.forwards_per_token:.2f}",
            f"{gated.forwards_per_token:.2f}",
            f"{evaluation.extra_forwards:+.2f}",
        ),
        SummaryRow(
            "tokens/s (noisy)",
            f"{base.tokens_per_s:.1f}",
            f"{gated.tokens_per_s:.1f}",
            f"× {evaluation.speed_ratio:.2f}",
        ),
    ]


def comparison_rows(comparison: HeadComparison) -> list[tuple[str, str, str, str]]:
    """Return the rows of the table of two heads: measure, first head, other head, change."""
    rows = []
    for name, scores in comparison.rewards.items():
        if scores.difference is None:
            rows.append((name, "-", "-", f"no opinion on any of {scores.num_dropped} prompts"))
            continue
        means = f"{scores.first_mean:.3g}", f"{scores.other_mean:.3g}"
        rows.append((f"{name}: mean", *means, _interval(scores.difference, "+.3g")))
        record = f"{scores.wins} wins, {scores.ties} ties, {scores.losses} losses"
        rows.append((f"{name}: other against first", "", record, ""))
    forwards, other_forwards = comparison.first_forwards_per_token, comparison.other_forwards_per_token
    changed = f"{comparison.num_changed} of {comparison.num_prompts}"
    return [
        *rows,
        ("perplexity under the base model", "", "", f"× {_interval(comparison.perplexity_ratio, '.2f')}"),
        ("forwards a token", f"{forwards:.2f}", f"{other_forwards:.2f}", f"{other_forwards - forwards:+.2f}"),
        ("replies that differ", "", changed, ""),
    ]


def verdict(evaluation: Evaluation) -> str:
    """Return what was found, in a sentence or two."""
    parts = []
    for name, comparison in list(evaluation.rewards.items())[:1]:
        if comparison.difference is None:
            parts.append(f"{name} has no opinion on these replies")
            continue
        low, high = comparison.difference.low, comparison.difference.high
        finding = "better" if low > 0 else "worse" if high < 0 else "not clearly different"
        if comparison.base_compliance is not None and comparison.gated_compliance is not None:
            figures = f"{comparison.base_compliance.mean:.0%} -> {comparison.gated_compliance.mean:.0%} comply"
        else:
            figures = f"mean {comparison.base_mean:.3g} -> {comparison.gated_mean:.3g}"
        parts.append(f"{name}: {finding} with the head ({figures}, {comparison.num_pairs} prompts)")
        if comparison.fine_changed is not None:
            count = round(comparison.fine_changed.mean * comparison.num_fine)
            parts.append(f"{count} of {comparison.num_fine} base replies that were fine were changed")
    ratio = evaluation.perplexity_ratio.mean
    parts.append(f"perplexity × {ratio:.2f}, speed × {evaluation.speed_ratio:.2f}")
    return "; ".join(parts) + "."


def glossary(evaluation: Evaluation) -> dict[str, str]:
    """Return what the words of the table and of the gate's line mean, those that occur."""
    return explained(" ".join([*(row.measure for row in summary_rows(evaluation)), gate_line(evaluation)]))


def explained(text: str) -> dict[str, str]:
    """Return the words of a text that the glossary has, with their meanings."""
    return {word: meaning for word, meaning in GLOSSARY.items() if word in text}


def settings_line(evaluation: Evaluation) -> str:
    """Return the settings of the comparison, in a line."""
    sampling = evaluation.sampling
    decoding = f"temperature {sampling.temperature:g}" if sampling.temperature else "greedy"
    candidates = f"top-k {sampling.top_k}, top-p {sampling.top_p:g}"
    return (
        f"{len(evaluation.examples)} prompts · {evaluation.form} head, strength {evaluation.strength:g} · {decoding}, "
        f"{candidates}, up to {sampling.max_new_tokens} tokens, seed {sampling.seed}"
    )


def gate_line(evaluation: Evaluation) -> str:
    """Return the counts of the gate's decisions in all replies, in a line."""
    return stats_line(evaluation.gate, evaluation.gated.num_tokens)


def stats_line(gate: GateStats, total: int) -> str:
    """Return the counts of the gate's decisions in `total` tokens, in a line."""
    taken = {"accepted": gate.accepted, "forced": gate.forced, "fallback": gate.fallbacks, "single": gate.single}
    shares = ", ".join(f"{count} {name} ({count / total:.0%})" for name, count in taken.items() if count)
    return f"{total} tokens: {shares or 'the gate was not asked'}; {gate.rejected} candidates visited and not taken"


def render_html(
    evaluation: Evaluation, provenance: Provenance | None = None, comparisons: Sequence[HeadComparison] = ()
) -> str:
    """Return the page: one file, no script, nothing loaded from elsewhere."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_finalize
    )
    environment.filters.update(tooltip=_tooltip, strike=struck_text, score=score_text)
    template = resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        evaluation=evaluation,
        rows=summary_rows(evaluation),
        comparisons=[(each, comparison_rows(each)) for each in comparisons],
        settings=settings_line(evaluation),
        gate=gate_line(evaluation),
        verdict=verdict(evaluation),
        glossary=glossary(evaluation),
        provenance=provenance or Provenance.now(),
        regressions=evaluation.regressions(_MOST_REGRESSIONS),
        losses={number for number, example in enumerate(evaluation.examples) if _is_loss(evaluation, example)},
        footnote=FOOTNOTE,
        most_rejected=MOST_REJECTED,
    )


def check_report_path(path: str | Path) -> None:
    """Check before the work that a report can be written there.

    Raises:
        ConfigError: If its name ends in neither `.html` nor `.json`.
        OutputError: If its folder can't be written to.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"report {str(path)!r} has no known format", hint=f"its name ends in {' or '.join(FORMATS)}")
    if path.is_dir():
        raise ConfigError(f"report {str(path)!r} is a folder", hint="name a file")
    check_writable(path.parent)


def write_report(
    evaluation: Evaluation,
    path: str | Path,
    provenance: Provenance | None = None,
    comparisons: Sequence[HeadComparison] = (),
) -> None:
    """Write the report in the form its name ends in; raises as `check_report_path`.

    Args:
        evaluation: A head beside the base model.
        path: The file.
        provenance: Where the figures come from; None is this process, now.
        comparisons: Other heads beside that one.
    """
    check_report_path(path)
    provenance = provenance or Provenance.now()
    if Path(path).suffix.lower() == ".json":
        whole = {"provenance": asdict(provenance), **json.loads(evaluation.to_json())}
        whole["comparisons"] = [asdict(each) for each in comparisons]
        write_atomically(path, json.dumps(whole, ensure_ascii=False, indent=1) + "\n")
    else:
        write_atomically(path, render_html(evaluation, provenance, comparisons))


def _is_loss(evaluation: Evaluation, example: Example) -> bool:
    return any(example.gain(name) < 0 for name in evaluation.rewards)


def _finalize(value: object) -> object:
    """Make a value's control characters visible before it is escaped; markup comes from the template alone."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _tooltip(item: Mark | Rejected) -> str:
    """Return the numbers of one candidate, in words."""
    parts = [f"base probability {math.exp(item.log_prob):.3g}"]
    if item.accept_logit is not None:
        parts.append(f"accept logit {item.accept_logit:+.2f}")
    if isinstance(item, Rejected) and item.push is not None:
        parts.append(f"of which the head {item.push:+.2f}")
    if isinstance(item, Mark):
        parts.insert(0, _OUTCOMES[item.outcome])
    return " · ".join(parts)


_OUTCOMES = {
    "base": "base model, no gate",
    "single": "the only candidate, so the head was not asked",
    "accepted": "accepted",
    "forced": "last candidate left, forced",
    "fallback": "all candidates rejected, fallback",
}


def _reward_rows(name: str, comparison: Comparison) -> list[SummaryRow]:
    if comparison.difference is None or comparison.preference is None:
        return [SummaryRow(name, "-", "-", f"no opinion on any of {comparison.num_dropped} prompts")]
    if comparison.base_compliance is not None and comparison.gated_compliance is not None:
        first = SummaryRow(
            f"{name}: complies",
            _share(comparison.base_compliance),
            _share(comparison.gated_compliance),
            f"{_interval(comparison.difference, '+.1f', 100)} points",
        )
    else:
        means = f"{comparison.base_mean:.3g}", f"{comparison.gated_mean:.3g}"
        first = SummaryRow(f"{name}: mean", *means, _interval(comparison.difference, "+.3g"))
    dropped = f", {comparison.num_dropped} without opinion" if comparison.num_dropped else ""
    record = f"{comparison.wins} wins, {comparison.ties} ties, {comparison.losses} losses{dropped}"
    rows = [first, SummaryRow(f"{name}: preference", "", record, _interval(comparison.preference, "+.2f"))]
    if comparison.fine_changed is not None:
        of = f"of {comparison.num_fine}, {comparison.fine_worse} now worse"
        rows.append(SummaryRow(f"{name}: fine replies changed", "", of, _share(comparison.fine_changed)))
    return rows


def _share(interval: Interval) -> str:
    return f"{_interval(interval, '.1f', 100)} %"


def _interval(interval: Interval, form: str, scale: float = 1.0) -> str:
    mean, low, high = (format(scale * value, form) for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"
