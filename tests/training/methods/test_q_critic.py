"""The critic of Q-heads: what follows a token, by returns first, then by what the next position is worth."""

from __future__ import annotations

import pytest
import torch

from mara_integrations.training.methods.q_critic import ScoredPositions
from mara_integrations.training.rollouts.positions import Positions

GAMMA = 0.5


@pytest.fixture
def scored():
    """Two replies of tokens with these gains; the second token of the first one had no other candidate."""
    gains = [[1.0, 2.0, 4.0, 8.0], [16.0, 32.0]]
    where = [(0, 0), (0, 2), (0, 3), (1, 0), (1, 1)]
    returns = [sum(GAMMA**k * gain for k, gain in enumerate(gains[reply][place:])) for reply, place in where]
    of_candidates = torch.tensor([[gains[reply][place], -1.0] for reply, place in where])
    replies, places = (torch.tensor(column) for column in zip(*where, strict=True))
    zeros = torch.zeros(5, dtype=torch.long)
    halves = torch.full((5, 2), 0.5).log()
    positions = Positions(torch.zeros(5, 3), torch.zeros(5, 2, dtype=torch.long), halves, zeros, replies, places, 6)
    return ScoredPositions(positions, of_candidates, torch.tensor(returns), GAMMA)


def test_returns_stand_for_themselves(scored):
    torch.testing.assert_close(scored.returns_through(scored.returns), scored.returns)


def test_values_of_the_next_position_stand_for_what_comes_then(scored):
    values = torch.tensor([100.0, 200.0, 300.0, 400.0, 500.0])
    want = [
        1.0 + GAMMA * 2.0 + GAMMA**2 * 200.0,  # the token without a choice lies between
        4.0 + GAMMA * 300.0,
        8.0,  # nothing follows
        16.0 + GAMMA * 500.0,
        32.0,
    ]
    torch.testing.assert_close(scored.returns_through(values), torch.tensor(want))
