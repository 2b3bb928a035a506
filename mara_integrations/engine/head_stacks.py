"""Evaluate the heads of many requests together: heads of one shape are stacked into batched matrices."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from mara_integrations.engine.candidate_features import CandidateFeatures, OutputEmbeddings, version_of
from mara_integrations.heads.afterstate import AfterstateHead
from mara_integrations.heads.compose import Head, afterstate_parts, q_parts
from mara_integrations.heads.head import MARAHead
from mara_integrations.heads.q import QHead

HeadT = TypeVar("HeadT", bound=MARAHead)

# Rows of a stacked evaluation, empty ones included, for each row asked for; beyond, heads are evaluated one by one.
_MAX_PADDING = 2


# Slots of a stack for each head asked for; beyond, it is made anew without the heads that have gone.
_MAX_SPARE = 4


class HeadInput(NamedTuple):
    """Hidden states that one sequence has its afterstate heads score.

    Attributes:
        head: The head.
        states: Hidden states after each of W candidates, (W, d).
        previous: Hidden state before each candidate, (W, d), or (d,) where they share it.
    """

    head: Head
    states: Tensor
    previous: Tensor


class PositionInput(NamedTuple):
    """A position whose candidates Q-heads score.

    Attributes:
        head: The head.
        state: Hidden state before the candidates, (d,).
        num_candidates: How many there are.
    """

    head: Head
    state: Tensor
    num_candidates: int


class HeadStacks:
    """Scores candidates under any number of heads: one evaluation a shape, one wait for the device.

    Args:
        kept_bytes: Most memory for what heads make of candidates; with 0, nothing that was scored before changes a
            digit of what is scored next.
    """

    def __init__(self, kept_bytes: int = 0) -> None:
        self._stacks: dict[tuple[Any, ...], _Stack] = {}
        self._features = CandidateFeatures(kept_bytes)

    @torch.inference_mode()
    def score(self, inputs: Sequence[HeadInput]) -> list[list[float]]:
        """The score of each candidate, summed over the afterstate parts of its head; see `AfterstateHead.score`."""
        if not inputs:
            return []
        parts = [afterstate_parts(head) for head, _, _ in inputs]
        scores = []
        groups = list(_by_shape(parts))
        for shape, askers in groups:
            states = [torch.cat([inputs[i].states for i in indices]) for indices in askers.values()]
            previous = [
                torch.cat([inputs[i].previous.expand_as(inputs[i].states) for i in indices])
                for indices in askers.values()
            ]
            if _is_worth_stacking([len(rows) for rows in states]):
                scores.append(self._stack(shape, askers).score(list(askers), states, previous))
            else:
                scores += [head.score(*rows) for head, *rows in zip(askers, states, previous, strict=True)]
        values = iter(torch.cat(scores).tolist())
        sums = [[0.0] * len(states) for _, states, _ in inputs]
        for _, askers in groups:
            for part, indices in askers.items():
                for i in indices:
                    factor = parts[i][part]
                    sums[i] = [total + factor * next(values) for total in sums[i]]
        return sums

    @torch.inference_mode()
    def score_positions(
        self, inputs: Sequence[PositionInput], token_ids: Tensor, embeddings: OutputEmbeddings, vocab_size: int
    ) -> Tensor:
        """The score of each candidate, summed over the Q-heads among the parts of its head; see `QHead.score`.

        Args:
            inputs: At least one position.
            token_ids: Candidates of all positions, position by position, (N,), on the device of the heads.
            embeddings: Gives their output embeddings, on that device.
            vocab_size: Number of all tokens.

        Returns:
            Shape (N,), float32.
        """
        parts = [q_parts(head) for head, _, _ in inputs]
        states = torch.stack([state for _, state, _ in inputs])
        counts = torch.tensor([count for _, _, count in inputs], device=states.device)
        if len(parts[0]) == 1 and all(own == parts[0] for own in parts):  # the usual case: one head for all
            ((head, factor),) = parts[0].items()
            return factor * _q(head, states, counts, self._features.of(head, token_ids, embeddings, vocab_size))
        return self._score_under_several(inputs, parts, states, counts, embeddings(token_ids))

    def _score_under_several(
        self,
        inputs: Sequence[PositionInput],
        parts: Sequence[Mapping[QHead, float]],
        states: Tensor,
        counts: Tensor,
        embeddings: Tensor,
    ) -> Tensor:
        """The scores under the parts of different heads; states (P, d), counts (P,), embeddings (N, d) to (N,)."""
        ends = counts.cumsum(0).tolist()
        total: Tensor | None = None
        for shape, askers in _by_shape(parts):
            own_rows = [
                [torch.arange(ends[i] - inputs[i].num_candidates, ends[i]) for i in indices]
                for indices in askers.values()
            ]
            rows = [torch.cat(own).to(states.device) for own in own_rows]
            own_states = [states[indices] for indices in askers.values()]
            own_counts = [counts[indices] for indices in askers.values()]
            candidates = [embeddings[own] for own in rows]
            if _is_worth_stacking([len(own) for own in candidates]):
                scores = self._stack(shape, askers).score_positions(list(askers), own_states, own_counts, candidates)
            else:
                features = [head.candidate_features(own) for head, own in zip(askers, candidates, strict=True)]
                scores = torch.cat([_q(*own) for own in zip(askers, own_states, own_counts, features, strict=True)])
            weights = [parts[i][part] for part, indices in askers.items() for i in indices]
            factors = torch.tensor(weights, dtype=torch.float32, device=states.device)
            scores = scores * factors.repeat_interleave(torch.cat(own_counts))
            scores = scores.new_zeros(len(embeddings)).index_add_(0, torch.cat(rows), scores)
            total = scores if total is None else total + scores
        assert total is not None, "every position has a Q-head"
        return total

    def _stack(self, shape: tuple[Any, ...], heads: Iterable[MARAHead]) -> _Stack:
        """Return the stack for heads of a shape, with their weights as they are now."""
        stack = self._stacks.pop(shape, None) or _Stack()
        stack.place(list(heads))  # one that fails is not kept: it may be half made
        self._stacks[shape] = stack
        return stack


def _by_shape(parts: Sequence[Mapping[HeadT, float]]) -> Iterator[tuple[tuple[Any, ...], dict[HeadT, list[int]]]]:
    """Heads that can be stacked together, and the indices of the inputs that each has to score."""
    asked: dict[tuple[Any, ...], dict[HeadT, list[int]]] = {}
    for index, own in enumerate(parts):
        for part in own:
            asked.setdefault(stack_shape(part), {}).setdefault(part, []).append(index)
    yield from asked.items()


def _is_worth_stacking(num_rows: Sequence[int]) -> bool:
    """Return whether heads with so many rows each are evaluated faster together than one by one."""
    return len(num_rows) > 1 and max(num_rows) * len(num_rows) <= _MAX_PADDING * sum(num_rows)


def _q(head: QHead, states: Tensor, counts: Tensor, of_candidates: Tensor) -> Tensor:
    """Scores of one head: states (P, d), candidates of each (P,), features of these (N, r) to (N,)."""
    of_states = head.state_features(states)  # (P, r)
    if len(of_states) == 1:
        return (of_candidates @ of_states[0]).float()
    return (of_states.repeat_interleave(counts, 0) * of_candidates).sum(-1).float()


class _Stack:
    """Weights of heads of one shape side by side, (S, ...) each; a head keeps its slot while others come and go."""

    def __init__(self) -> None:
        self._slots: OrderedDict[MARAHead, int] = OrderedDict()  # least recently asked first
        self._versions: dict[MARAHead, tuple[int, ...]] = {}
        self._weights: dict[str, Tensor] = {}

    def score(self, heads: Sequence[AfterstateHead], states: Sequence[Tensor], previous: Sequence[Tensor]) -> Tensor:
        """`AfterstateHead.score` of each head for its rows, (N_i, d) each; all scores in order, float32 (sum N_i,)."""
        slots = [self._slots[head] for head in heads]
        out = self._afterstate(slots, states)
        match heads[0].config.form:
            case "paper":
                return (out[:, 1] - out[:, 0]).float()
            case "value":
                out = out - self._afterstate(slots, previous)
        return out[:, 0].float()

    def score_positions(
        self,
        heads: Sequence[QHead],
        states: Sequence[Tensor],
        counts: Sequence[Tensor],
        embeddings: Sequence[Tensor],
    ) -> Tensor:
        """`QHead.score` of each head for its positions; all scores in order, float32 (sum N_i,).

        Args:
            heads: Heads of one shape.
            states: Hidden states of each head's positions, (P_i, d) each.
            counts: Candidates of each position, (P_i,) each.
            embeddings: Output embeddings of these candidates, (N_i, d) each.
        """
        slots = [self._slots[head] for head in heads]
        x, places = self._spread(slots, states)
        x = stacked_state_features(self._weights, x)
        of_states = x.flatten(0, 1)[places].repeat_interleave(torch.cat(list(counts)), 0)  # (N, r)
        x, places = self._spread(slots, embeddings)
        x = _linear(self._weights, "candidate_linear", layer_norm(x, x.shape[-1:])).relu()
        return (of_states * x.flatten(0, 1)[places]).sum(-1).float()

    def _afterstate(self, slots: Sequence[int], states: Sequence[Tensor]) -> Tensor:
        """`AfterstateHead.forward` of the heads in these slots for their rows, (N_i, d) each: (sum N_i, out)."""
        x, places = self._spread(slots, states)
        x = _linear(self._weights, "linear1", _norm(self._weights, x)).relu()
        x = _linear(self._weights, "linear2", x).relu()
        return _linear(self._weights, "output_linear", x).flatten(0, 1)[places]

    def _spread(self, slots: Sequence[int], rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Rows of each slot, padded to the longest: (S, W, d), and the place of each row among S * W, (N,)."""
        weight, widest = self._weights["ln.weight"], max(map(len, rows))
        num_slots, width = weight.shape
        numbers = [slot * widest + k for slot, own in zip(slots, rows, strict=True) for k in range(len(own))]
        places = torch.tensor(numbers, device=weight.device)
        x = weight.new_zeros(num_slots * widest, width)
        x[places] = torch.cat(list(rows)).to(x.dtype)
        return x.view(num_slots, widest, width), places

    def place(self, heads: Sequence[MARAHead]) -> None:
        """Give each head a slot, with its weights as they are now."""
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
            if self._versions.get(head) != (version := version_of(head.parameters())):
                for name, weights in self._weights.items():
                    weights[self._slots[head]] = head.get_parameter(name).detach()
                self._versions[head] = version

    def _restack(self, heads: Sequence[MARAHead]) -> None:
        # the names of all: a damaged head that lacks a layer must fail here, not leave a stack without it to the others
        names = dict.fromkeys(name for head in heads for name, _ in head.named_parameters())
        self._weights = {name: torch.stack([head.get_parameter(name).detach() for head in heads]) for name in names}
        self._slots = OrderedDict((head, slot) for slot, head in enumerate(heads))
        self._versions = {head: version_of(head.parameters()) for head in heads}


def stacked_state_features(weights: Mapping[str, Tensor], states: Tensor) -> Tensor:
    """`QHead.state_features` of stacked heads: states (S, W, d) to (S, W, r).

    Args:
        weights: Weights of S heads by name, (S, ...) each.
        states: Hidden states of each head's positions, padded to the most of any head.
    """
    return _linear(weights, "linear2", _linear(weights, "linear1", _norm(weights, states)).relu())


def _norm(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """`MARAHead.ln` of every slot, (S, W, d)."""
    return layer_norm(x, x.shape[-1:]) * weights["ln.weight"][:, None] + weights["ln.bias"][:, None]


def _linear(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A linear layer of every slot, (S, W, in) to (S, W, out)."""
    return torch.baddbmm(weights[f"{name}.bias"][:, None], x, weights[f"{name}.weight"].transpose(1, 2))


def stack_shape(head: MARAHead) -> tuple[Any, ...]:
    """Heads that agree in it can be stacked."""
    weight = head.get_parameter("ln.weight")
    return head.config.form, head.config.hidden_size, head.config.inner_sizes, weight.dtype, weight.device
