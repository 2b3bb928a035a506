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


def blind(head: QHead) -> QHead:
    """Make the features of the state the same everywhere, for good, and return the head."""
    head.linear2.weight.register_hook(torch.zeros_like)  # stays 0, so that A(h) is the bias alone
    return head


def train(run: Run, head: MARAHead) -> MethodResult:
    """Train such a head."""
    assert isinstance(head, QHead)
    method = replace(METHODS[run.plan.method.name], form="q")
    result = method.train(run, blind(head))
    assert not head.linear2.weight.any()
    return result
