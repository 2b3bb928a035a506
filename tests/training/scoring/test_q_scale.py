"""The scale of a head is such that sampled replies keep perplexity and variety."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.q import QHead
from mara_integrations.training.scoring import q_scale


@pytest.mark.parametrize(
    ("perplexity", "distinct", "budget", "scale", "held"),
    [
        (1.10, 0.97, None, 2.0, 2.0),  # within both bounds
        (1.10, 0.90, None, 2.0, 2.0 * 2.0 ** (-1 / 2.8)),  # twice what variety may lose, at the scale of the replies
        (1.15**4, 0.97, None, 2.0, 2.0 * 4.0 ** (-1 / 2.8)),  # four times what perplexity may
        (1.10, 0.90, None, 1.2, 1.2),  # the scale of the budget is lower already
        (1.10, 0.90, 0.3, 2.0, 2.0),  # a budget that the user has named
    ],
)
def test_sampled_replies_keep_perplexity_and_variety(perplexity, distinct, budget, scale, held, monkeypatch):
    head = QHead(HeadConfig(form="q", hidden_size=16, scale=scale))
    run = SimpleNamespace(config=SimpleNamespace(kl_budget=budget), say=lambda _: None)
    monkeypatch.setattr(q_scale, "quality_ratios", lambda *_: (perplexity, distinct))

    q_scale.hold_sampled_quality(run, head, 2.0, [], [])

    assert head.config.scale == pytest.approx(held)
