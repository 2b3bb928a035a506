"""Evaluate the heads of many requests together: heads of one shape are stacked into batched matrices."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from mara_integrations.heads.compose import Head
from mara_integrations.heads.head import MARAHead

# Rows of a stacked evaluation, empty ones included, for each row asked for; beyond, heads are evaluated one by one.
_MAX_PADDING = 2


# Slots of a stack for each head asked for; beyond, it is made anew without the heads that have gone.
_MAX_SPARE = 4


class HeadInput(NamedTuple):
    """Hidden states that one sequence has its head score.

    Attributes:
        head: The head.
        states: Hidden states after each of W candidates, (W, d).
        previous: Hidden state before each candidate, (W, d), or (d,) where they share it.
    """

    head: Head
    states: Tensor
    previous: Tensor


class HeadStacks:
    """Scores candidates under any number of heads: one evaluation a shape, one wait for the device."""

    def __init__(self) -> None:
        self._stacks: dict[tuple[Any, ...], _Stack] = {}

    @torch.inference_mode()
    def score(self, inputs: Sequence[HeadInput]) -> list[list[float]]:
        """The head's score of each candidate, for a composed head the sum over its parts; see `MARAHead.score`."""
        if not inputs:
            return []
        asked: dict[tuple[Any, ...], dict[MARAHead, list[int]]] = {}
        for index, (head, _, _) in enumerate(inputs):
            for part in head.parts:
                asked.setdefault(_shape(part), {}).setdefault(part, []).append(index)
        scores = []
        for shape, askers in asked.items():
            states = [torch.cat([inputs[i].states for i in indices]) for indices in askers.values()]
            previous = [
                torch.cat([inputs[i].previous.expand_as(inputs[i].states) for i in indices])
                for indices in askers.values()
            ]
            num_rows, widest = sum(map(len, states)), max(map(len, states))
            if len(askers) == 1 or widest * len(askers) > _MAX_PADDING * num_rows:
                scores += [head.score(*rows) for head, *rows in zip(askers, states, previous, strict=True)]
            else:
                scores.append(self._stacks.setdefault(shape, _Stack()).score(list(askers), states, previous))
        values = iter(torch.cat(scores).tolist())
        sums = [[0.0] * len(states) for _, states, _ in inputs]
        for askers in asked.values():
            for part, indices in askers.items():
                for i in indices:
                    factor = inputs[i].head.parts[part]
                    sums[i] = [total + factor * next(values) for total in sums[i]]
        return sums


class _Stack:
    """Weights of heads of one shape side by side, (S, ...) each; a head keeps its slot while others come and go."""

    def __init__(self) -> None:
        self._slots: OrderedDict[MARAHead, int] = OrderedDict()  # least recently asked first
        self._versions: dict[MARAHead, tuple[int, ...]] = {}
        self._weights: dict[str, Tensor] = {}

    def score(self, heads: Sequence[MARAHead], states: Sequence[Tensor], previous: Sequence[Tensor]) -> Tensor:
        """`MARAHead.score` of each head for its rows, (N_i, d) each; all scores in order, (sum N_i,), float32."""
        slots, widest = self._place(heads), max(map(len, states))
        rows = [slot * widest + k for slot, mine in zip(slots, states, strict=True) for k in range(len(mine))]
        places = torch.tensor(rows, device=states[0].device)
        out = self._run(torch.cat(list(states)), places, widest)
        match heads[0].config.form:
            case "paper":
                return (out[:, 1] - out[:, 0]).float()
            case "value":
                out = out - self._run(torch.cat(list(previous)), places, widest)
        return out[:, 0].float()

    def _run(self, hidden: Tensor, places: Tensor, widest: int) -> Tensor:
        """`MARAHead.forward` of all heads on rows (N, d), each at its place among S x `widest`: (N, out)."""
        weights = self._weights
        num_slots, width = weights["ln.weight"].shape
        x = weights["ln.weight"].new_zeros(num_slots * widest, width)
        x[places] = hidden.to(x.dtype)
        x = layer_norm(x.view(num_slots, widest, width), (width,))  # (S, widest, d)
        x = x * weights["ln.weight"][:, None] + weights["ln.bias"][:, None]
        for name in ("linear1", "linear2", "output_linear"):
            bias, weight = weights[f"{name}.bias"], weights[f"{name}.weight"]
            x = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
            x = x if name == "output_linear" else x.relu()
        return x.flatten(0, 1)[places]

    def _place(self, heads: Sequence[MARAHead]) -> list[int]:
        """The slot of each head, its weights there as they are now."""
        for head in heads:
            if head in self._slots:
                self._slots.move_to_end(head)
        missing = [head for head in heads if head not in self._slots]
        spare = [head for head in self._slots if head not in heads]
        if len(missing) > len(spare) or len(self._slots) > _MAX_SPARE * len(heads):
            self._restack(heads)
        else:
            for head, gone in zip(missing, spare, strict=False):
                self._slots[head] = self._slots.pop(gone)
                del self._versions[gone]
        for head in heads:
            if self._versions.get(head) != (version := _version(head)):
                for name, weight in head.named_parameters():
                    self._weights[name][self._slots[head]] = weight.detach()
                self._versions[head] = version
        return [self._slots[head] for head in heads]

    def _restack(self, heads: Sequence[MARAHead]) -> None:
        names = [name for name, _ in heads[0].named_parameters()]
        self._weights = {name: torch.stack([head.get_parameter(name).detach() for head in heads]) for name in names}
        self._slots = OrderedDict((head, slot) for slot, head in enumerate(heads))
        self._versions = {head: _version(head) for head in heads}


def _shape(head: MARAHead) -> tuple[Any, ...]:
    """Heads that agree in it can be stacked."""
    weight = head.ln.weight
    return head.config.form, head.config.hidden_size, head.config.inner_sizes, weight.dtype, weight.device


def _version(head: MARAHead) -> tuple[int, ...]:
    """Changes when the weights do: a head may be trained between two requests."""
    return tuple(n for p in head.parameters() for n in (p.data_ptr(), 0 if p.is_inference() else p._version))
