"""The paper's training as its released code has it, with its quirks: a reproduction beside the method `sac`.

Where that code departs from the paper's text, this script follows the code: rewards are posted back to every decision
but the first, the last candidate of a position counts as a decision, the "KL" is a part of the reward, and the target
critics stand still between episodes. Updates begin after 65,536 decisions, so a run takes some 2,000 replies.

    python benchmarks/published_sac.py --data prompts.jsonl --reward sentiment --output runs/published

Source: arXiv 2505.19743; IAAR-Shanghai/MARA (SAC.py, distri_executor.py, llm_env.py and the launch scripts).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mara_integrations.engine.gate import gated_log_probs
from mara_integrations.heads.afterstate import AfterstateHead
from mara_integrations.heads.head import MARAHead
from mara_integrations.progress import ConsoleReporter, Reporter
from mara_integrations.training.config import TrainConfig
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.learning.actor_critic import SACSettings
from mara_integrations.training.learning.credit import postback_credit
from mara_integrations.training.methods.sac import Rollout, train_with
from mara_integrations.training.plan import make_plan
from mara_integrations.training.registry import METHODS
from mara_integrations.training.rollouts.replies import Reply
from mara_integrations.training.run import TrainResult, train_plan

PUBLISHED = SACSettings(
    batch_size=1024,
    updates=10,
    warmup=64 * 1024,
    gamma=0.99,
    tau=0.005,
    target_every=10,
    temperature=0.01,
    credit="postback",
    kl_weight=0.0,  # its "KL" is a part of the reward, see `published_kl`
    include_forced=True,
    standardise=False,
)
_KL_WEIGHT = 0.1  # `--kl_ctl`
_MAX_REPLIES = 2048


def train_loop(run: Run, head: MARAHead) -> MethodResult:
    """Fit a head of the paper's form in place."""
    return train_with(run, head, PUBLISHED, published_credit)


def published_credit(run: Run, settings: SACSettings, rollout: Rollout) -> Tensor:
    """Return the immediate reward of each decision, (N,).

    Source: distri_executor.py, `update`, whose loop stops before index 0; SAC.py, `explore_with_env`.
    """
    credit = postback_credit(rollout.decisions, rollout.rewards, settings.gamma)
    counts = rollout.decisions.counts
    starts = (counts.cumsum(0) - counts)[counts > 1]  # a lone decision is the last one, and keeps its reward
    credit[starts] = 0.0
    return credit + published_kl(rollout.head, rollout.replies, _KL_WEIGHT)


@torch.inference_mode()
def published_kl(head: AfterstateHead, replies: Sequence[Reply], weight: float) -> Tensor:
    """Return the code's "KL" reward of each decision, forced ones included, (N,).

    Its log-probability of a candidate is a log_softmax over the probabilities, and the base model's is that after a
    temperature of 0.8. So the reward comes to weight * log p / 0.8 and nearly a constant, and rejected candidates get
    theirs as well. Two details differ here, because what was never visited is not known: p is renormalised over the
    candidates, and each unvisited candidate counts in the log_softmax with an equal share of the probability left,
    which moves the reward by less than weight * ln((K - 1 + e) / K).

    Args:
        head: The head that generated the replies, of the paper's form.
        replies: The replies, with their positions.
        weight: Weight of the reward (`--kl_ctl`).

    Source: SAC.py, `explore_with_env` and `_kl_penalty`, with `--cond_prob --kl_penalty kl` as its scripts set them.
    """
    rewards = [torch.zeros(0)]
    for reply in replies:
        for position in reply.positions:
            visited = position.token_ids.index(reply.token_ids[position.index]) + 1
            states = position.states[:visited]
            z = head.score(states, position.previous.expand_as(states)).cpu()
            # one more column stands for the candidates that were not visited, and takes what is left
            gated = gated_log_probs(torch.cat([z, z[-1:]])[None], torch.ones(1, visited + 1, dtype=torch.bool))[0].exp()
            hazards = torch.tensor(position.hazard_logits)
            base = gated_log_probs(hazards[None], torch.ones(1, len(hazards), dtype=torch.bool))[0, :visited]
            unvisited = len(hazards) - visited
            spread = gated[:-1].exp().sum() + (unvisited * (gated[-1] / unvisited).exp() if unvisited else 0.0)
            rewards.append(-weight * (gated[:-1] - spread.log() - base / 0.8))
    return torch.cat(rewards)


def train_published(config: TrainConfig, reporter: Reporter | None = None) -> TrainResult:
    """Train a head with the settings of the paper's code.

    Raises:
        MaraError: See `train`; ConfigError, too, if there are too few replies for an update.
    """
    config = config.updated(method="sac", form="paper", max_replies=config.max_replies or _MAX_REPLIES)
    plan = make_plan(config)
    method = replace(METHODS["sac"], loop=f"{__name__}:train_loop", form="paper", kl_budget=None)
    return train_plan(config, replace(plan, method=method), reporter=reporter or Reporter())


def main(arguments: list[str] | None = None) -> TrainResult:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="prompts")
    parser.add_argument("--reward", required=True, help="reward, as `mara-tools train` takes it")
    parser.add_argument("--output", type=Path, required=True, help="folder of the head")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another setting of `mara-tools train`"
    )
    args = parser.parse_args(arguments)
    changed: dict[str, Any] = dict(setting.split("=", 1) for setting in args.set)
    config = TrainConfig.of(data=args.data, reward=args.reward, output=args.output, **changed)
    return train_published(config, ConsoleReporter(Console()))


if __name__ == "__main__":
    main()
