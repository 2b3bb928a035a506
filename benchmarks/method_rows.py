"""Rows of benchmarks that train heads: one head, seed and decoding each; kept as json, summed up and compared.

Differences are paired by prompt: a head's replies to one prompt stay together when prompts are resampled. A judge that
has no opinion on a reply leaves its prompt out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from mara_integrations.errors import DataError
from mara_integrations.evaluation.metrics import paired_bootstrap
from mara_integrations.evaluation.results import Evaluation
from mara_integrations.files import write_atomically
from mara_integrations.heads.head import MARAHead

Row: TypeAlias = dict[str, Any]
SIDES = ("base", "gated")
UNDER = "under the sentence"  # after the name of a head: the same sides with the sentence as a system prompt


def training_options(doc: str, output: str) -> argparse.ArgumentParser:
    """Return the parser of a benchmark that trains heads, with the options that all of these have.

    Args:
        doc: Documentation of the module; its first line describes the command.
        output: Default of the folder of the heads.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of `mara-tools train`"
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--output", type=Path, default=Path(output), help="folder of what is trained")
    parser.add_argument("--json", type=Path, help="file of the rows")
    return parser


class RowFile:
    """Rows by name in a json file, which is written whenever one is added; without a path they are only kept."""

    def __init__(self, path: Path | None) -> None:
        self.rows: dict[str, Row] = {}
        self._path = path
        if path is not None and path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or "rows" not in content:
                raise DataError(f"{path} holds no rows of this benchmark", hint="name another file with --json")
            self.rows = content["rows"]

    def of(self, head: str, seeds: Sequence[int], decoding: str) -> list[Row] | None:
        """Return the rows of a head, one a seed; None where one is missing."""
        names = [f"{head}, seed {seed}, {decoding}" for seed in seeds]
        return [self.rows[name] for name in names] if all(name in self.rows for name in names) else None

    def add(self, name: str, row: Row) -> None:
        """Keep a row, and write the file."""
        self.rows[name] = row
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps({"rows": self.rows}, indent=1) + "\n")


def row_of(evaluation: Evaluation, head: MARAHead) -> Row:
    """The figures of an evaluation, and each prompt's scores; none of its texts."""
    return {
        "scores": {
            name: {side: [getattr(example, side).scores[name] for example in evaluation.examples] for side in SIDES}
            for name in evaluation.rewards
        },
        "preferred": {name: asdict(c.preference) if c.preference else None for name, c in evaluation.rewards.items()},
        "perplexity": asdict(evaluation.perplexity_ratio),
        "distinct_2": evaluation.gated.distinct_2 / evaluation.base.distinct_2,
        "forwards": evaluation.gate.fed / evaluation.gated.num_tokens,
        "scale": head.config.scale,
        "kl_per_token": head.config.metrics.get("kl_per_token"),
    }


def shown(label: str, row: Row) -> str:
    """One line of the table."""
    opinions = []
    for name in row["scores"]:
        base, gated = (number(_mean(row["scores"][name][side])) for side in SIDES)
        opinions.append(f"{name} {base} -> {gated}, preferred {interval(row['preferred'][name])}")
    cost = (
        f"perplexity x {row['perplexity']['mean']:.2f}, distinct-2 x {row['distinct_2']:.2f}, "
        f"{row['forwards']:.1f} forwards a token"
    )
    return f"{label}: {'; '.join(opinions)}; {cost}"


def over_seeds(label: str, rows: Sequence[Row]) -> list[str]:
    """Each judge's mean over the seeds, with intervals over prompts."""
    perplexity = _mean([row["perplexity"]["mean"] for row in rows])
    distinct = _mean([row["distinct_2"] for row in rows])
    lines = []
    for name in rows[0]["scores"]:
        base, gated = (number(_mean([_mean(row["scores"][name][side]) for row in rows])) for side in SIDES)
        gains = _over_seeds(rows, name, lambda base, gated: gated - base)
        signs = _over_seeds(rows, name, lambda base, gated: float((gated > base) - (gated < base)))
        lines.append(
            f"{label}, {name}: {base} -> {gated}, difference {interval(_bootstrap(gains))}, "
            f"preferred {interval(_bootstrap(signs))}; perplexity x {perplexity:.2f}, distinct-2 x {distinct:.2f}"
        )
    return lines


def against(
    label: str, rows: Sequence[Row], others: Sequence[Row], sides: tuple[str, str] = ("gated", "gated")
) -> list[str]:
    """How much higher each judge scores one head's replies than another's, over seeds, with intervals over prompts.

    `sides` says which replies of each are compared: those of the head, or of the base model. A reply is preferred where
    its mean over the seeds is higher.
    """
    lines = []
    for name in rows[0]["scores"]:
        ours, theirs = (
            _over_seeds(of_head, name, lambda base, gated, side=side: gated if side == "gated" else base)
            for of_head, side in zip((rows, others), sides, strict=True)
        )
        differences = list(map(_difference, ours, theirs))
        signs = [None if each is None else float((each > 0) - (each < 0)) for each in differences]
        shown = f"{interval(_bootstrap(differences))}, preferred {interval(_bootstrap(signs))}"
        lines.append(f"{label}, {name}: {shown}")
    return lines


def beside_sentence(kept: RowFile, name: str, seeds: Sequence[int], decoding: str) -> list[str]:
    """How a head and the sentence that it was made of, as a system prompt, do alone and together."""
    plain, under = (kept.of(way, seeds, decoding) for way in (name, f"{name} {UNDER}"))
    assert plain is not None and under is not None
    label = f"{name}, {len(seeds)} seeds, {decoding}"
    ways = {
        "base model": (plain, "base"),
        "sentence": (under, "base"),
        "head": (plain, "gated"),
        "both": (under, "gated"),
    }
    lines = over_seeds(label, plain)
    for judge in plain[0]["scores"]:
        means = (f"{way} {number(_mean_score(rows, judge, side))}" for way, (rows, side) in ways.items())
        lines.append(f"{label}, {judge}: {', '.join(means)}")
    pairs = (("sentence", "base model"), ("head", "sentence"), ("both", "sentence"), ("both", "head"))
    for one, other in pairs:
        (ours, our_side), (theirs, their_side) = ways[one], ways[other]
        lines += against(f"{label}, {one} less {other}", ours, theirs, (our_side, their_side))
    return lines


def _mean_score(rows: Sequence[Row], judge: str, side: str) -> float:
    """A judge's mean score of one side's replies, over all rows and prompts."""
    return _mean([_mean(row["scores"][judge][side]) for row in rows])


def number(value: float) -> str:
    """A mean, as the lines show it."""
    return f"{value:+.2f}"


def interval(found: dict[str, float] | None) -> str:
    """A mean with its interval, as the lines show it."""
    return "-" if found is None else f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def _over_seeds(rows: Sequence[Row], name: str, value: Callable[[float, float], float]) -> list[float | None]:
    """Mean over the seeds of a value of both scores of each prompt; None where a judge has no opinion on a reply."""
    sides = [[row["scores"][name][side] for side in SIDES] for row in rows]
    by_seed = [[None if None in pair else value(*pair) for pair in zip(*of_seed, strict=True)] for of_seed in sides]
    return [None if None in of_prompt else _mean(of_prompt) for of_prompt in zip(*by_seed, strict=True)]


def _difference(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours - theirs


def _bootstrap(values: Sequence[float | None]) -> dict[str, float]:
    known = [value for value in values if value is not None]
    return asdict(paired_bootstrap([0.0] * len(known), known))


def _mean(values: Sequence[float | None]) -> float:
    """Mean of the opinions."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0
