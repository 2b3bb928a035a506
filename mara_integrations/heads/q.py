"""Heads that judge a candidate by the state before it and its output embedding, without feeding it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.head import MARAHead


class QHead(MARAHead):
    """Action values q(h, c) = A(h) . B(E[c]), from the hidden state h that the logits were computed from.

    A(h) is LayerNorm(d), Linear(d, m), ReLU, Linear(m, r), and is needed once a position. B(E[c]) is the candidate's
    row of the output embeddings, normalised to mean 0 and variance 1, Linear(d, r), ReLU, and does not depend on the
    position. A new head scores 0 everywhere, which is exactly the base model.

    At the optimum of E[reward] - KL / strength, q is the advantage of taking the candidate.

    Source: bilinear rewards over a vocabulary in one forward, Troshin et al. 2024 (arXiv 2407.04615); the features of
    the candidate have a ReLU here, with which a head of this size fits as well as a perceptron of state and candidate.
    """

    def __init__(self, config: HeadConfig) -> None:
        assert config.form == "q"
        super().__init__(config)
        width, rank = config.inner_sizes
        self.ln = nn.LayerNorm(config.hidden_size)
        self.linear1 = nn.Linear(config.hidden_size, width)
        self.linear2 = nn.Linear(width, rank)
        self.candidate_linear = nn.Linear(config.hidden_size, rank)
        nn.init.zeros_(self.linear2.weight)
        nn.init.zeros_(self.linear2.bias)

    def state_features(self, hidden: Tensor) -> Tensor:
        """A of hidden states after the final norm, (N, d) to (N, r)."""
        x = torch.relu(self.linear1(self.ln(hidden.to(self.ln.weight.dtype))))
        out: Tensor = self.linear2(x)
        return out

    def candidate_features(self, embeddings: Tensor) -> Tensor:
        """B of rows of the output embeddings, (N, d) to (N, r)."""
        x = layer_norm(embeddings.to(self.ln.weight.dtype), embeddings.shape[-1:])
        return torch.relu(self.candidate_linear(x))

    def score(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """Return q of pairs of state and candidate, each (N, d), as float32 (N,)."""
        return (self.state_features(hidden) * self.candidate_features(embeddings)).sum(-1).float()
