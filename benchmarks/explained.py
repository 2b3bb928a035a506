"""Measure how well heads of several kinds predict what a sentence changes.

The model reads its own replies twice: under the sentence, and under what it is contrasted with. Every head is fitted to
the change in each candidate's log-probability. The heads are a table of biases over the vocabulary, Q-heads of several
ranks, and a perceptron that sees state and candidate together, which would be too slow to serve. The script prints the
share of the variance on held-out replies that each explains, weighted as in training, at its best epoch on them.

    python benchmarks/explained.py cheerful --data FOLDER [--seed 0] [--set contrast=neutral]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from method_tasks import TASKS, written
from rich.console import Console
from token_biases import blind
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from mara_integrations.heads.config import Q_SIZES, HeadConfig
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.models.load import ModelSpec, load_model
from mara_integrations.progress import ConsoleReporter
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.engine import with_choices
from mara_integrations.training.inputs import Inputs
from mara_integrations.training.learning.fit import Targets, fit
from mara_integrations.training.learning.q_objectives import score_loss
from mara_integrations.training.methods import principle
from mara_integrations.training.methods.contrast import ContrastLearner, train_on_contrast
from mara_integrations.training.methods.q_regression import standardised
from mara_integrations.training.methods.readings import Difference, Side
from mara_integrations.training.plan import make_plan
from mara_integrations.training.rollouts.positions import Positions, q_scores
from mara_integrations.training.run import train_plan

RANKS = (16, 64, 256)
PERCEPTRON = (256, 64)  # widths of the two hidden layers


class Perceptron(MARAHead):
    """A perceptron of three layers over the state and the candidate's output embedding, side by side."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        size, (wide, narrow) = config.hidden_size, config.inner_sizes
        self.of_state = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, wide))
        self.of_candidate = nn.Linear(size, wide)
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(wide, narrow), nn.ReLU(), nn.Linear(narrow, 1))
        nn.init.zeros_(self.rest[-1].weight)
        nn.init.zeros_(self.rest[-1].bias)

    def scores(self, states: Tensor, candidates: Tensor) -> Tensor:
        """Scores of candidates, given states (P, d) and output embeddings (P, K, d), as (P, K)."""
        of_candidates = self.of_candidate(layer_norm(candidates, candidates.shape[-1:]))
        scores: Tensor = self.rest(self.of_state(states)[:, None] + of_candidates)[..., 0]
        return scores


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, print and return the share that each head explains."""
    args = _parser().parse_args(arguments)
    task, model = TASKS[args.task], load_model(ModelSpec(args.model))
    changed = dict(setting.split("=", 1) for setting in args.set)
    args.output.mkdir(parents=True, exist_ok=True)
    data = written(args.output / f"{args.task}.jsonl", task.data(args.data, model))
    output, length = args.output / "-".join([args.task, *args.set, str(args.seed)]), task.reply_tokens
    settings = {"model": args.model, "max_reply_tokens": length, "eval_prompts": 0, **task.settings, **changed}
    reporter = ConsoleReporter(Console())
    config = with_choices(TrainConfig.of(output=output, data=data, seed=args.seed, **settings), reporter)
    plan = make_plan(config, Inputs())
    plan = replace(plan, method=replace(plan.method, q_loop="explained:train"))
    train_plan(config, plan, reporter=reporter)
    shares: dict[str, float] = MARAHead.from_pretrained(output).config.metrics["explained"]
    print(f"{args.task}: share of the variance on held-out replies that is explained")
    for name, share in shares.items():
        print(f"  {name}: {share:.1%}")
    return shares


def train(run: Run, head: MARAHead) -> MethodResult:
    """Train a head as usual, and compare the others on what it learns from."""
    shares: dict[str, float] = {}

    def differences(run: Run, sides: Sequence[Side]) -> list[Difference]:
        found = principle.differences(run, sides)
        if not shares:  # the first time; rounds would come later
            shares.update(explained(run, standardised([s.positions for s in sides], [f.values for f in found])))
        return found

    learner = ContrastLearner(run, head, differences)
    result = train_on_contrast(learner, principle.CONTRASTS[run.config.principle_contrast])
    return replace(result, metrics={**result.metrics, "explained": shares})


def explained(run: Run, sides: Sequence[Targets]) -> dict[str, float]:
    """Fit heads of all kinds to the first side; return the share of the variance of the second that each explains."""
    config, embeddings = run.new_head().config, run.backend.output_embeddings

    def q_head(rank: int) -> QHead:
        return QHead(config.model_copy(update={"inner_sizes": (Q_SIZES[0], rank)}))

    def score(head: MARAHead, where: Positions) -> Tensor:
        if isinstance(head, QHead):
            return q_scores(head, where.states, where.token_ids, embeddings)
        assert isinstance(head, Perceptron)
        return head.scores(
            where.states.float(), embeddings(where.token_ids.flatten()).unflatten(0, where.token_ids.shape)
        )

    heads: dict[str, MARAHead] = {"token biases": blind(q_head(Q_SIZES[1]))}
    heads |= {f"Q-head of rank {rank}": q_head(rank) for rank in RANKS}
    heads["perceptron"] = Perceptron(config.model_copy(update={"inner_sizes": PERCEPTRON}))
    settings = replace(run.fit_settings(1e-3), batch_size=1024)
    shares = {}
    for name, head in heads.items():
        with run.fitting(name) as on_epoch:
            history = fit(
                head,
                *sides,
                lambda head, part: score_loss(score(head, part.positions), part.values, part.positions.log_probs),
                settings,
                on_epoch,
            )
        shares[name] = 1 - min(epoch.held_out_loss for epoch in history) / history[0].held_out_loss
    return shares


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=[name for name, task in TASKS.items() if "principle" in task.settings])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of `mara-tools train`"
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--output", type=Path, default=Path("runs/explained"), help="folder of the heads")
    return parser


if __name__ == "__main__":
    main()
