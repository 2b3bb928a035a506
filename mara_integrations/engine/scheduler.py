"""Decides which sequences are in the next forward, and how much each feeds; no tensors. Affects speed, never tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from mara_integrations.engine.backends.prefix_cache import BLOCK_TOKENS, PrefixCache
from mara_integrations.engine.backends.protocol import RowSize
from mara_integrations.engine.gate import Verdict
from mara_integrations.engine.request import Request
from mara_integrations.engine.sequence import Sequence
from mara_integrations.engine.speculation.cost import CostCurve, best_draft, best_width

# Tokens a forward takes for little more than the price of one: measured on CPU cores, reasoned for an accelerator,
# where a step is bound by reading the weights.
CPU_KNEE, ACCELERATOR_KNEE = 8, 200
# Waiting requests that are looked at in one step.
_LOOK_AHEAD = 64
# Prompt tokens in a forward while others decode are a share of those in one that only reads: nobody waits long.
_SHARE_BESIDE_DECODING = 4


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A request that waits to begin.

    Attributes:
        request: The request.
        size: How large its row may grow.
        blocks: Hashes of its prompt, see `block_hashes`; none where the prompt is not kept.
        keeps_prefix: Whether its prompt is kept for others once it is read.
    """

    request: Request
    size: RowSize
    blocks: list[int]
    keeps_prefix: bool


class Scheduler:
    """Admission of requests, and the widths of what they feed.

    Args:
        max_live: Sequences decoded at once.
        prefill_chunk: Prompt tokens in one forward, of all sequences together; fewer while others decode.
        knee: Tokens a forward carries at little cost, where `cost` does not say.
        cost: Measured cost of a forward.
        feeds_all: Feed all candidates of a position at once, for those who need the state of each.

    Attributes:
        accept_rates: Running share of accepted candidates, of the first of a position (True) and of later ones (False).
    """

    def __init__(
        self,
        *,
        max_live: int = 64,
        prefill_chunk: int = 512,
        knee: int = CPU_KNEE,
        cost: CostCurve | None = None,
        feeds_all: bool = False,
    ) -> None:
        self.max_live = max_live
        self.prefill_chunk = prefill_chunk
        self.cost = cost or CostCurve.flat_to(knee)
        self.waiting: deque[Waiting] = deque()
        self.live: list[Sequence] = []
        self._reading: dict[Sequence, frozenset[int]] = {}  # sequences whose prompts will be kept, and their blocks
        self.feeds_all = feeds_all
        self.accept_rates = {True: 0.9, False: 0.5}

    def admit(
        self, start: Callable[[Waiting], Sequence], fits: Callable[[RowSize], bool], prefixes: PrefixCache
    ) -> None:
        """Make waiting requests live, first come first served, while there is room in the batch and in memory.

        A request whose prompt begins like one that is being read waits until that is kept; those behind it go first.
        Only the first ones are looked at, so a long queue costs nothing.

        Args:
            start: Begins a request on a row of its own.
            fits: Whether there is memory for a row of this size beside the live ones.
            prefixes: The kept prefixes.
        """
        self._reading = {sequence: blocks for sequence, blocks in self._reading.items() if sequence.is_prefilling}
        for waiting in list(islice(self.waiting, _LOOK_AHEAD)):
            if len(self.live) >= self.max_live or not fits(waiting.size):
                return
            if self._reading and self._is_being_read(waiting, prefixes):
                continue
            self.waiting.remove(waiting)
            sequence = start(waiting)
            self.live.append(sequence)
            if waiting.keeps_prefix:
                self._reading[sequence] = frozenset(waiting.blocks)

    def _is_being_read(self, waiting: Waiting, prefixes: PrefixCache) -> bool:
        """Return whether a live sequence reads a block of this prompt that is not kept yet."""
        num_known = prefixes.longest(waiting.request.prompt_ids, waiting.blocks)[1]
        next_block = -(-num_known // BLOCK_TOKENS)
        if next_block >= len(waiting.blocks):
            return False
        return any(waiting.blocks[next_block] in blocks for blocks in self._reading.values())

    def retire(self) -> list[Sequence]:
        """Take out the sequences that need no more forwards."""
        done = [sequence for sequence in self.live if not sequence.needs_forward]
        self.live = [sequence for sequence in self.live if sequence.needs_forward]
        for sequence in done:
            self._reading.pop(sequence, None)
        return done

    def clear(self) -> list[Sequence]:
        """Drop all waiting and live requests; return the live sequences."""
        live, self.live = self.live, []
        self.waiting.clear()
        self._reading.clear()
        return live

    def plan(self) -> list[tuple[Sequence, int]]:
        """Return the sequences of the next forward, and how many prompt tokens each may feed; the others wait.

        These are all sequences that decode, and as many of those that read their prompts as fit, earlier ones first.
        """
        room = self.prefill_chunk
        if not all(sequence.is_prefilling for sequence in self.live):
            room = max(1, room // _SHARE_BESIDE_DECODING)
        plan = []
        for sequence in self.live:
            chunk = min(room, len(sequence.pending))
            if not sequence.is_prefilling:
                plan.append((sequence, len(sequence.pending)))
            elif chunk:
                plan.append((sequence, chunk))
                room -= chunk
        return plan

    def width(self, sequence: Sequence) -> int:
        """Candidates to feed at once, see `best_width`."""
        if self.feeds_all:
            return sequence.num_candidates_left
        return best_width(self.cost, len(self.live), sequence.num_candidates_left, *self._accept_rates(sequence))

    def num_drafted(self, sequence: Sequence, right: float) -> int:
        """Tokens to feed behind its next one, given the probability that such a token is right; see `best_draft`."""
        if self.feeds_all:
            return 0
        rates = self._accept_rates(sequence)
        return best_draft(self.cost, len(self.live), sequence.num_candidates_left, *rates, round(min(right, 0.95), 2))

    def _accept_rates(self, sequence: Sequence) -> tuple[float, float]:
        """Return the accept rates of the next candidate and of those after it."""
        if sequence.position is None:
            return 1.0, 0.0  # what is settled is taken
        first, later = (
            round(min(self.accept_rates[is_first], 0.95), 2) for is_first in (not sequence.position.states, False)
        )
        return first, later

    def observe(self, verdict: Verdict) -> None:
        """Learn from a decided position."""
        num_rejected = verdict.num_visited - verdict.accepted
        for place in range(verdict.num_visited):
            self.accept_rates[place == 0] += 0.05 * ((place == num_rejected) - self.accept_rates[place == 0])
