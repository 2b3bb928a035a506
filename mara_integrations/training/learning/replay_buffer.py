"""The replay buffer of `sac`: transitions of visited candidates, in tensors made once, on disk if memory is short."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mara_integrations.training.records.memory_mapped import MAX_BYTES_IN_MEMORY, on_disk


@dataclass(frozen=True, slots=True)
class Transitions:
    """Whole episodes, decision by decision; each leads to the next row unless it ends its episode.

    Attributes:
        states: Of the candidates asked about, half precision, (N, d).
        hazard_logits: Logit of the base model's own probability to accept each, (N,).
        accepted: What was done, (N,), bool.
        rewards: Received for it at once, (N,).
        ends: Whether the episode was over then, (N,), bool; the last row's is True.
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
    """Transitions with what came after them; next states of those that end are of no meaning, (B, d) and (B,)."""

    states: Tensor
    hazard_logits: Tensor
    accepted: Tensor
    rewards: Tensor
    ends: Tensor
    next_states: Tensor
    next_hazard_logits: Tensor


class ReplayBuffer:
    """A ring of the newest transitions.

    A row holds one state, for the state after it is the next row's: half the memory of pairs, and half precision halves
    it again.

    Args:
        capacity: Rows.
        hidden_size: Width d of the states.
        file: Where the states are if they are more than `max_bytes`; written over.
        max_bytes: Of states in memory.

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
        """Add whole episodes over the oldest rows; of more than fit, the last ones."""
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
        """Rows at random, with replacement, single precision, on a device."""
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
