"""What training reaches: each task trained with several seeds, judged on prompts that no training saw.

Sentiment of the replies, two forbidden words, harmlessness learnt from preference pairs (its two judges are fitted to
pairs the head never saw), two principles, a sentence with a reward, and tasks where context decides. Base and gate draw
the same random numbers; brackets are 95 % bootstrap intervals over the test prompts, of the mean over seeds in the last
lines. A sentence also stands beside its head as a system prompt, alone and with the head.

    python benchmarks/methods.py sentiment --data FOLDER [--seeds 0 1 2] [--set method=sac] [--json out.json]
    python benchmarks/methods.py ten-words --data FOLDER --head token-biases --json out.json

Rows that the json file holds are not measured again, and a training that was killed goes on: the same command resumes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from method_rows import UNDER, RowFile, against, beside_sentence, over_seeds, row_of, shown, training_options
from method_tasks import TASKS, Task, written
from rich.console import Console
from token_biases import blinded

from mara_integrations.evaluation.evaluate import evaluate
from mara_integrations.heads.head import MARAHead
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.progress import ConsoleReporter
from mara_integrations.rewards import weighted_rewards
from mara_integrations.runtime import MARAEngine
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.engine import with_choices
from mara_integrations.training.inputs import Inputs
from mara_integrations.training.plan import make_plan
from mara_integrations.training.run import train_plan

DECODINGS = {"sampled": 1.0, "greedy": 0.0}
HEADS = ("default", "afterstate", "token-biases")  # that of the method, of the form before, and the baseline


def main(arguments: list[str] | None = None) -> list[str]:
    """Train, judge and print; returns the lines."""
    args = _parser().parse_args(arguments)
    task, model, kept = TASKS[args.task], load_model(ModelSpec(args.model)), RowFile(args.json)
    changed = dict(setting.split("=", 1) for setting in args.set)
    requested = {key: float(value) for key, value in (setting.split("=", 1) for setting in args.ask)}
    trained_as = _name(args.task, args.head, changed)
    name = _name(args.task, args.head, {**changed, **requested})
    settings = {"model": args.model, "max_reply_tokens": task.reply_tokens, "eval_prompts": 0, **task.settings}
    settings |= {"form": "residual"} if args.head == "afterstate" else {}
    settings |= changed
    args.output.mkdir(parents=True, exist_ok=True)
    settings["data"] = written(args.output / f"{args.task}.jsonl", task.data(args.data, model))
    if task.prompts is not None and (settings["method"] == "reward-model" or settings.get("form", "q") == "q"):
        settings["prompts"] = written(args.output / "prompts.jsonl", task.prompts(args.data, model))
    judges, prompts = task.judges(args.data, model), task.test_prompts(args.data, model)

    ways: dict[str, dict[str, Any]] = {name: {}}
    if "principle" in settings:
        ways[f"{name} {UNDER}"] = {"system_prompt": settings["principle"]}

    lines = []
    for seed in args.seeds:
        labels = {(way, decoding): f"{way}, seed {seed}, {decoding}" for way in ways for decoding in DECODINGS}
        if not kept.rows.keys() >= set(labels.values()):
            output = args.output / f"{trained_as.replace(', ', '-').replace('/', '_')}-{seed}"
            head = _trained(TrainConfig.of(output=output, seed=seed, **settings), task, args.head == "token-biases")
            engine = MARAEngine(model, head)
        for (way, decoding), label in labels.items():
            if label not in kept.rows:
                asked = {"temperature": DECODINGS[decoding], "seed": seed, "max_new_tokens": task.reply_tokens}
                found = evaluate(engine, prompts, judges, **asked, **requested, **ways[way])
                kept.add(label, row_of(found, head))
            lines.append(shown(label, kept.rows[label]))
            print(lines[-1], flush=True)
    others = [_name(args.task, head, {**changed, **requested}) for head in HEADS if head != args.head]
    summary = _summary(kept, name, others, args.seeds)
    print("\n".join(summary), flush=True)
    return lines + summary


def _trained(config: TrainConfig, task: Task, is_blind: bool) -> MARAHead:
    """Train a head, or return the one that is finished."""
    rewards = [] if config.reward or task.reward is None else weighted_rewards(task.reward)
    reporter = ConsoleReporter(Console())
    config = with_choices(config, reporter)
    plan = make_plan(config, Inputs(rewards=rewards))
    start = time.monotonic()
    train_plan(config, blinded(plan) if is_blind else plan, reporter=reporter)
    minutes = (time.monotonic() - start) / 60
    print(f"{config.output.name}: {minutes:.1f} min of training, {torch.get_num_threads()} threads", flush=True)
    return MARAHead.from_pretrained(config.output)


def _summary(kept: RowFile, name: str, others: list[str], seeds: list[int]) -> list[str]:
    """Means over the seeds, and differences from the other heads where the file holds them for these seeds."""
    lines = []
    for decoding in DECODINGS:
        rows = kept.of(name, seeds, decoding)
        assert rows is not None
        has_sentence = kept.of(f"{name} {UNDER}", seeds, decoding) is not None
        label = f"{name}, {len(seeds)} seeds, {decoding}"
        lines += beside_sentence(kept, name, seeds, decoding) if has_sentence else over_seeds(label, rows)
        for other in others:
            if (theirs := kept.of(other, seeds, decoding)) is not None:
                lines += against(f"{name} less {other}, {decoding}", rows, theirs)
    return lines


def _name(task: str, head: str, changed: Mapping[str, Any]) -> str:
    return ", ".join([task, *([head] if head != "default" else []), *(f"{k}={v}" for k, v in changed.items())])


def _parser() -> argparse.ArgumentParser:
    parser = training_options(__doc__, "runs/methods")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--head", choices=HEADS, default="default")
    parser.add_argument(
        "--ask", action="append", default=[], metavar="NAME=NUMBER", help="a setting of the requests that are judged"
    )
    return parser


if __name__ == "__main__":
    main()
