"""What training reaches: each task trained with several seeds, judged on prompts that no training saw.

Sentiment of the replies, two forbidden words, and harmlessness learnt from preference pairs, whose two judges are
fitted to pairs the head never saw. Base and gate draw the same random numbers; brackets are 95 % bootstrap intervals
over the test prompts, of the mean over seeds in the last rows.

    python benchmarks/methods.py sentiment --data FOLDER [--seeds 0 1 2] [--set method=sac] [--json out.json]

FOLDER holds `saferlhf_prompts_{train,test}.jsonl` (PKU-SafeRLHF) and `hh_harmless_pairs.jsonl` (HH-RLHF).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mara_integrations.evaluation.evaluate import evaluate
from mara_integrations.evaluation.metrics import Interval, paired_bootstrap
from mara_integrations.evaluation.results import Evaluation
from mara_integrations.files import write_atomically
from mara_integrations.heads.head import MARAHead
from mara_integrations.models.load import LoadedModel, ModelSpec, load_model
from mara_integrations.progress import ConsoleReporter
from mara_integrations.rewards import ForbiddenWords, Reward, parse_reward
from mara_integrations.runtime import MARAEngine
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.run import train
from mara_integrations.training.scoring.fitted_reward import EmbeddingReward, NGramReward

WORDS = ("you", "your")
MAX_PROMPT_TOKENS, REPLY_TOKENS = 64, 40


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained for and how it is judged.

    Attributes:
        data: Rows of the file that is trained on, from the folder of the data.
        judges: Of the replies to the test prompts, by name.
        settings: Of the training.
        prompts: That replies are written to, where not to those of the data.
    """

    data: Callable[[Path, LoadedModel], list[dict[str, Any]]]
    judges: Callable[[Path, LoadedModel], Mapping[str, Reward]]
    settings: dict[str, Any] = field(default_factory=dict)
    prompts: Callable[[Path, LoadedModel], list[dict[str, Any]]] | None = None


def prompts(folder: Path, model: LoadedModel, side: str) -> list[dict[str, Any]]:
    """Distinct short prompts of PKU-SafeRLHF."""
    texts = dict.fromkeys(row["prompt"] for row in _rows(folder / f"saferlhf_prompts_{side}.jsonl"))
    count = 64 if side == "test" else 1300
    short = (text for text in texts if len(model.tokenizer(text).input_ids) <= MAX_PROMPT_TOKENS)
    return [{"prompt": text} for text, _ in zip(short, range(count), strict=False)]


def training_prompts(folder: Path, model: LoadedModel) -> list[dict[str, Any]]:
    """Those of the training side that are no test prompts."""
    test = prompts(folder, model, "test")
    return [row for row in prompts(folder, model, "train") if row not in test]


def pairs(folder: Path, half: int) -> list[dict[str, Any]]:
    """One half of the HH-RLHF pairs; dialogues with the same opening are in the same half."""
    rows = _rows(folder / "hh_harmless_pairs.jsonl")
    openings = sorted({row["prompt"][0]["content"] for row in rows})
    random.Random(0).shuffle(openings)
    chosen = set(openings[half::2])
    return [row for row in rows if row["prompt"][0]["content"] in chosen]


def harm_judges(folder: Path, model: LoadedModel) -> dict[str, Reward]:
    """Two judges of different kinds, of the replies as long as the test's, fitted to the other half of the pairs."""

    def cut(messages: list[dict[str, str]]) -> str:
        ids = model.tokenizer(messages[-1]["content"], add_special_tokens=False).input_ids[:REPLY_TOKENS]
        return str(model.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    rows = [(cut(row["chosen"]), cut(row["rejected"])) for row in pairs(folder, half=1)]
    return {"judge of words": NGramReward.fit(rows, 0), "judge of embeddings": EmbeddingReward.fit(rows, 0, model)}


TASKS = {
    "sentiment": Task(
        training_prompts, lambda *_: {"sentiment": parse_reward("sentiment")[0]}, {"reward": ("sentiment",)}
    ),
    "rule": Task(training_prompts, lambda *_: {"without the words": ForbiddenWords(WORDS)}, {"forbid": WORDS}),
    "harmlessness": Task(
        lambda folder, _: pairs(folder, half=0), harm_judges, {"method": "reward-model"}, training_prompts
    ),
}


def row(label: str, evaluation: Evaluation) -> str:
    """One line of the table."""
    stats, num_tokens = evaluation.gate, evaluation.gated.num_tokens
    opinions = [
        f"{name} {_number(found.base_mean)} -> {_number(found.gated_mean)}, preferred {_interval(found.preference)}"
        for name, found in evaluation.rewards.items()
    ]
    ratios = (
        f"perplexity x {evaluation.perplexity_ratio.mean:.2f}, distinct-2 x "
        f"{evaluation.gated.distinct_2 / evaluation.base.distinct_2:.2f}, {stats.fed / num_tokens:.1f} forwards a token"
    )
    return f"{label}: {'; '.join(opinions)}; {ratios}"


def over_seeds(label: str, evaluations: list[Evaluation]) -> list[str]:
    """Each judge's mean over the seeds, with intervals over prompts."""
    lines = []
    for name in evaluations[0].rewards:
        gains, signs = [], []
        for examples in zip(*(evaluation.examples for evaluation in evaluations), strict=True):
            differences = [(e.gated.scores[name] or 0.0) - (e.base.scores[name] or 0.0) for e in examples]
            gains.append(sum(differences) / len(differences))
            signs.append(sum((d > 0) - (d < 0) for d in differences) / len(differences))
        zeros = [0.0] * len(gains)
        gated = [evaluation.rewards[name].gated_mean or 0.0 for evaluation in evaluations]
        difference, preference = paired_bootstrap(zeros, gains), paired_bootstrap(zeros, signs)
        lines.append(
            f"{label}, {name}: gated {_number(sum(gated) / len(gated))}, difference {_interval(difference)}, "
            f"preferred {_interval(preference)}"
        )
    return lines


def main(arguments: list[str] | None = None) -> dict[str, list[str]]:
    """Train, judge and print; returns the lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of `mara-tools train`"
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--output", type=Path, default=Path("runs/methods"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    task, model = TASKS[args.task], load_model(ModelSpec(args.model))
    changed = dict(setting.split("=", 1) for setting in args.set)
    name = "-".join([args.task, *(f"{key}-{value}" for key, value in changed.items())]).replace("/", "_")
    args.output.mkdir(parents=True, exist_ok=True)
    data = _written(args.output / f"{args.task}.jsonl", task.data(args.data, model))
    settings = {**task.settings, **changed}
    if task.prompts is not None and settings.get("method") == "reward-model":
        settings["prompts"] = _written(args.output / "prompts.jsonl", task.prompts(args.data, model))
    judges, test = task.judges(args.data, model), [row["prompt"] for row in prompts(args.data, model, "test")]
    found: dict[str, list[Evaluation]] = {"sampled": [], "greedy": []}
    lines = []
    for seed in args.seeds:
        output = args.output / f"{name}-{seed}"
        config = TrainConfig.of(
            model=args.model,
            data=data,
            output=output,
            seed=seed,
            **{"max_reply_tokens": REPLY_TOKENS, "eval_prompts": 0, **settings},
        )
        start = time.monotonic()
        train(config, reporter=ConsoleReporter(Console()))  # one that is finished is not trained again
        minutes = (time.monotonic() - start) / 60
        engine = MARAEngine(model, MARAHead.from_pretrained(output))
        for decoding, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            evaluation = evaluate(engine, test, judges, temperature=temperature, seed=seed, max_new_tokens=REPLY_TOKENS)
            found[decoding].append(evaluation)
            lines.append(row(f"{name}, seed {seed}, {decoding}", evaluation))
            print(lines[-1], flush=True)
        print(f"{name}, seed {seed}: {minutes:.1f} min of training, {torch.get_num_threads()} threads", flush=True)
    for decoding, evaluations in found.items():
        lines += over_seeds(f"{name}, {len(evaluations)} seeds, {decoding}", evaluations)
        print("\n".join(lines[-len(judges) :]), flush=True)
    if args.json:
        write_atomically(args.json, json.dumps({"lines": lines}, indent=1) + "\n")
    return {name: lines}


def _written(path: Path, rows: list[dict[str, Any]]) -> Path:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _interval(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


if __name__ == "__main__":
    main()
