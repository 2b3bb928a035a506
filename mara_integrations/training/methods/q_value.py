"""The method `value` on Q-heads: what labels or rewards say of states, said of candidates before they are fed.

First V(s) is regressed on labels or rewards, as `value` does. Then q is fitted to the steps of V along replies of the
base model, V(s after a token) - V(s before it), given the state before and the token. What q says of a candidate that
was not taken, it has learned where that candidate was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mara_integrations.heads.afterstate import AfterstateHead
from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.training.collect.generated import generate_replies
from mara_integrations.training.collect.prompts import limited_prompts, replies_per_prompt
from mara_integrations.training.collect.workload import Generation, Workload
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.learning.fit import Targets, outputs
from mara_integrations.training.methods import value
from mara_integrations.training.methods.q_regression import regress
from mara_integrations.training.methods.value import fit_and_report
from mara_integrations.training.rollouts.positions import Positions
from mara_integrations.training.rollouts.replies import Reply

_HELD_OUT_SEED = 500_000  # apart from the seeds of replies to fit on


def train(run: Run, head: MARAHead) -> MethodResult:
    """Fit V to labels or rewards, and q to the steps of V."""
    assert isinstance(head, QHead)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.config.seed)
        config = HeadConfig(form="value", hidden_size=run.model.hidden_size)
        value_head = AfterstateHead(config).to(run.model.device)
    accuracy = fit_and_report(run, value_head)
    untrained, seed, each = run.new_head().eval(), run.config.seed, replies_per_prompt(run)
    sides = []
    for stage, data, first in (
        ("base replies", run.plan.prompts[0], seed),
        ("held-out base replies", run.plan.prompts[1], seed + _HELD_OUT_SEED),
    ):
        prompts = limited_prompts(run, data, each)
        replies = generate_replies(run, f"{stage} to step along", prompts, each, first, untrained, is_base=True)
        sides.append(steps_of(value_head, replies))
    deviation = float(sides[0].values.std()) or 1.0
    regress(run, "fit of q", head, *(Targets(side.positions, side.values / deviation) for side in sides))
    return MethodResult(accuracy)


def work(run: Run) -> Workload:
    """Return what `train` will do."""
    of_v, each, seed = value.work(run), replies_per_prompt(run), run.config.seed
    sides = zip(run.plan.prompts, (seed, seed + _HELD_OUT_SEED), strict=True)
    steps = [
        Generation(limited_prompts(run, data, each), each, first, is_gated=True, is_base=True) for data, first in sides
    ]
    return replace(of_v, generations=[*of_v.generations, *steps], fitted=of_v.fitted + sum(map(len, steps)))


@torch.inference_mode()
def steps_of(value_head: AfterstateHead, replies: Sequence[Reply]) -> Targets:
    """Return the positions of replies with the token taken alone, and the step of V that it made, (P, 1)."""
    positions = Positions.of(replies)
    values = [outputs(value_head, reply.states) for reply in replies]  # (T + 1,) each
    steps: list[Tensor] = [of_reply.diff() for of_reply in values]
    rows = zip(positions.replies.tolist(), positions.places.tolist(), strict=True)
    return Targets(positions.only_taken(), torch.stack([steps[index][place] for index, place in rows])[:, None])
