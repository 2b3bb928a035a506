"""Fitting a head to examples: minibatches, early stopping on held-out ones, the best epoch kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from mara_integrations.heads.head import MARAHead
from mara_integrations.training.rollouts.positions import Positions


@dataclass(frozen=True, slots=True)
class FitSettings:
    """Settings of a fit.

    Attributes:
        epochs: Largest number of epochs.
        patience: Epochs without a lower held-out loss before the fit stops.
        learning_rate: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        batch_size: Examples a step.
        seed: Seed of the order of the examples.
    """

    epochs: int = 20
    patience: int = 4
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    batch_size: int = 512
    seed: int = 0


class Examples(Protocol):
    """A sequence of examples that a head is fitted to."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def take(self, rows: Tensor) -> Self:
        """Return the examples at these indices, in that order."""


ExamplesT = TypeVar("ExamplesT", bound=Examples)
Loss = Callable[[MARAHead, ExamplesT], Tensor]  # mean over the examples, a scalar


@dataclass(frozen=True, slots=True)
class Rows:
    """Examples whose fields, tensors or other `Examples`, have a row for each."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def take(self, rows: Tensor) -> Self:
        """Return the examples at these indices, in that order."""
        values = (getattr(self, field.name) for field in fields(self))
        return type(self)(*(each[rows] if isinstance(each, Tensor) else each.take(rows) for each in values))


@dataclass(frozen=True, slots=True)
class Table(Rows):
    """N examples of one state each.

    Attributes:
        states: Hidden states, (N, d).
        targets: Targets of the head's output, (N,).
        weights: Weights of the examples, (N,).
    """

    states: Tensor
    targets: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class Targets(Rows):
    """Positions, and a target for q of each of their candidates.

    Attributes:
        positions: P positions.
        values: Targets, (P, K).
    """

    positions: Positions
    values: Tensor


def outputs(head: MARAHead, states: Tensor) -> Tensor:
    """Return the head's one output at each state, (N, d) half precision to (N,), on the CPU; in parts of a few MB."""
    device = head.device
    return torch.cat([head(part.to(device).float())[:, 0] for part in states.split(4096)]).cpu()


@dataclass(frozen=True, slots=True)
class Epoch:
    """Losses after one epoch; epoch 0 is before the first step."""

    epoch: int
    train_loss: float
    held_out_loss: float


def fit(
    head: MARAHead,
    train: ExamplesT,
    held_out: ExamplesT,
    loss: Loss[ExamplesT],
    settings: FitSettings,
    on_epoch: Callable[[Epoch], None],
) -> list[Epoch]:
    """Fit a head in place and leave it as it was after the epoch with the lowest held-out loss; return all epochs.

    Epoch 0, before the first step, is never the best one: whether fitting helped at all is for the caller to judge.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    history = [Epoch(0, _evaluate(head, train, loss), _evaluate(head, held_out, loss))]
    on_epoch(history[0])
    best, best_weights, since_best = math.inf, _weights(head), 0
    head.train().requires_grad_(True)
    for number in range(1, settings.epochs + 1):
        total = 0.0
        for rows in torch.randperm(len(train), generator=generator).split(settings.batch_size):
            batch_loss = loss(head, train.take(rows))
            optimizer.zero_grad(set_to_none=True)
            batch_loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            total += float(batch_loss.detach()) * len(rows)
        epoch = Epoch(number, total / len(train), _evaluate(head, held_out, loss))
        history.append(epoch)
        on_epoch(epoch)
        if math.isfinite(epoch.held_out_loss) and epoch.held_out_loss < best:
            best, best_weights, since_best = epoch.held_out_loss, _weights(head), 0
        else:
            since_best += 1
            if since_best >= settings.patience:
                break
    head.load_state_dict(best_weights)
    head.eval().requires_grad_(False)
    return history


@torch.inference_mode()
def _evaluate(head: MARAHead, examples: ExamplesT, loss: Loss[ExamplesT]) -> float:
    return float(loss(head, examples))


def _weights(head: MARAHead) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in head.state_dict().items()}
