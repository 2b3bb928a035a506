"""Heads that judge a candidate by the state after it: a three-layer perceptron on hidden states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mara_integrations.heads.config import HeadConfig
from mara_integrations.heads.head import MARAHead


class AfterstateHead(MARAHead):
    """LayerNorm(d), Linear(d, h), ReLU, Linear(h, h/4), ReLU, Linear(h/4, out); out is 2 for `paper`, else 1.

    A new `residual` or `value` head scores 0 everywhere, which is exactly the base model.

    Source: Zhang et al. 2025 (arXiv 2505.19743), section 3; layer names of its published checkpoints.
    """

    def __init__(self, config: HeadConfig) -> None:
        assert config.form != "q"
        super().__init__(config)
        wide, narrow = config.inner_sizes
        self.ln = nn.LayerNorm(config.hidden_size)
        self.linear1 = nn.Linear(config.hidden_size, wide)
        self.linear2 = nn.Linear(wide, narrow)
        self.output_linear = nn.Linear(narrow, 2 if config.form == "paper" else 1)
        if config.form != "paper":
            nn.init.zeros_(self.output_linear.weight)
            nn.init.zeros_(self.output_linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores of hidden states: (..., d) to (..., 2) class logits (`paper`), (..., 1) f or V (the other forms)."""
        x = torch.relu(self.linear1(self.ln(hidden)))
        out: Tensor = self.output_linear(torch.relu(self.linear2(x)))
        return out

    def score(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Return the score of each candidate, which `gate.accept_logit` takes.

        Args:
            hidden: State of the candidate, after the final norm, shape (N, d).
            previous: State of the last token before it, shape (N, d); only the `value` form looks at it.

        Returns:
            Shape (N,), float32.
        """
        out: Tensor = self(hidden.to(self.ln.weight.dtype))
        if self.config.form == "paper":
            return (out[:, 1] - out[:, 0]).float()
        if self.config.form == "value":
            out = out - self(previous.to(self.ln.weight.dtype))
        return out[:, 0].float()
