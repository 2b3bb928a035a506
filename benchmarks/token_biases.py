"""The baseline that a Q-head has to beat: a head of the same size that cannot see the state, only the candidate.

It is trained by the same method on the same replies: what it reaches, a table of biases over the vocabulary reaches.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead
from mara_integrations.training.context import MethodResult, Run
from mara_integrations.training.plan import Plan
from mara_integrations.training.registry import METHODS


def blinded(plan: Plan) -> Plan:
    """Return a plan that trains such a head by the same method."""
    return replace(plan, method=replace(plan.method, form="q", q_loop=f"{__name__}:train"))


def train(run: Run, head: MARAHead) -> MethodResult:
    """Train a Q-head whose features of the state are the same everywhere."""
    assert isinstance(head, QHead)
    head.linear2.weight.register_hook(torch.zeros_like)  # stays 0, so that A(h) is the bias alone
    method = replace(METHODS[run.plan.method.name], form="q")
    result = method.train(run, head)
    assert not head.linear2.weight.any()
    return result
