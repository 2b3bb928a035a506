"""The replay buffer of `sac`: transitions of visited candidates in preallocated tensors, on disk if they are large."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mara_integrations.training.records.memory_mapped import MAX_BYTES_IN_MEMORY, on_disk


@dataclass(frozen=True, slots=True)
class Transitions:
    """Whole episodes, decision by decision; the next state of a row is the next row's, unless the episode ends there.

    Attributes:
        states: Hidden states of the candidates decided on, half precision, (N, d).
        hazard_logits: Logits of the base model's own probability to accept each, (N,).
        accepted: Action taken, (N,), bool.
        rewards: Immediate rewards, (N,).
        ends: Whether the episode ends with the decision, (N,), bool; true in the last row.
    """

    states: Tensor
    hazard_logits: Tensor
    accepted: Tensor
    rewards: Tensor
    ends: Tensor

    def __len__(self) -> int:
        return len(self.rewards)


@dataclass(frozen=True, slots=True)
class Batch:
    """B transitions with their next states, (B, d) and (B,); next states of those that end an episode are arbitrary."""

    states: Tensor
    hazard_logits: Tensor
    accepted: Tensor
    rewards: Tensor
    ends: Tensor
    next_states: Tensor
    next_hazard_logits: Tensor


class ReplayBuffer:
    """A ring of the newest transitions.

    A row holds one state, because the next state is the next row's: half the memory of (state, next state).

    Args:
        capacity: Number of rows.
        hidden_size: Width d of the states.
        file: File of the states if they take more than `max_bytes`; overwritten.
        max_bytes: Largest size of states that are held in memory.

    Raises:
        OutputError: If the disk has no room for the file.
    """

    def __init__(self, capacity: int, hidden_size: int, file: Path, max_bytes: int = MAX_BYTES_IN_MEMORY) -> None:
        self.capacity, self._count, self._next = capacity, 0, 0
        if 2 * capacity * hidden_size <= max_bytes:
            self._states = torch.zeros(capacity, hidden_size, dtype=torch.half)
        else:
            self._states = on_disk(file, capacity, hidden_size)
        self._hazard_logits, self._rewards = torch.zeros(capacity), torch.zeros(capacity)
        self._accepted, self._ends = torch.zeros(2, capacity, dtype=torch.bool)

    def __len__(self) -> int:
        return self._count

    def add(self, transitions: Transitions) -> None:
        """Overwrite the oldest rows with whole episodes; if they do not fit, with the last ones."""
        count = min(len(transitions), self.capacity)
        if count == 0:
            return
        rows = (self._next + torch.arange(count)) % self.capacity
        self._states[rows] = transitions.states[-count:]
        self._hazard_logits[rows] = transitions.hazard_logits[-count:]
        self._accepted[rows] = transitions.accepted[-count:]
        self._rewards[rows] = transitions.rewards[-count:]
        self._ends[rows] = transitions.ends[-count:]
        self._next = (self._next + count) % self.capacity
        self._count = min(self._count + count, self.capacity)

    def sample(self, count: int, generator: torch.Generator, device: torch.device) -> Batch:
        """Return rows drawn at random with replacement, in single precision, on a device."""
        rows = torch.randint(self._count, (count,), generator=generator)
        after = (rows + 1) % self.capacity
        return Batch(
            self._states[rows].to(device).float(),
            self._hazard_logits[rows].to(device),
            self._accepted[rows].to(device),
            self._rewards[rows].to(device),
            self._ends[rows].to(device),
            self._states[after].to(device).float(),
            self._hazard_logits[after].to(device),
        )
