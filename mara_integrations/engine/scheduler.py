"""Who is in the next forward, and how much of each; no tensors. It changes time, never tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from mara_integrations.engine.backends.prefix_cache import MIN_TOKENS, PrefixCache, shared
from mara_integrations.engine.gate import Verdict
from mara_integrations.engine.request import Request
from mara_integrations.engine.sequence import Sequence
from mara_integrations.engine.speculation.cost import CostCurve, best_draft, best_width

# Tokens a forward takes for little more than the price of one: measured on CPU cores, reasoned for an accelerator,
# where a step is bound by reading the weights.
CPU_KNEE, ACCELERATOR_KNEE = 8, 200


# Prompt tokens in a forward while others decode are a share of those in one that only reads: nobody waits long.
_SHARE_BESIDE_DECODING = 4


class Scheduler:
    """Admission of requests, and the widths of what they feed.

    Args:
        max_live: Sequences decoded at once.
        prefill_chunk: Prompt tokens in one forward, of all sequences together; fewer while others decode.
        knee: Tokens a forward carries at little cost, where `cost` does not say.
        cost: Of a forward.
        feeds_all: Feed all candidates of a position at once, for those who need the state of each.
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
        self.waiting: deque[Request] = deque()
        self.live: list[Sequence] = []
        self.feeds_all = feeds_all
        self._accepted = {True: 0.9, False: 0.5}  # running share of first, and of later candidates

    def admit(self, start: Callable[[Request], Sequence], prefixes: PrefixCache) -> None:
        """Make waiting requests live while there is room, first come first served.

        One whose prompt begins like one that is being read right now waits until that is kept.
        """
        for request in list(self.waiting):
            if len(self.live) >= self.max_live:
                return
            known = prefixes.longest(request.prompt_ids)[1]
            reading = [sequence.request.prompt_ids for sequence in self.live if sequence.is_prefilling]
            if any(shared(request.prompt_ids, prompt_ids) - known >= MIN_TOKENS for prompt_ids in reading):
                continue
            self.waiting.remove(request)
            self.live.append(start(request))

    def retire(self) -> list[Sequence]:
        """Take out the sequences that need no more forwards."""
        done = [sequence for sequence in self.live if not sequence.needs_forward]
        self.live = [sequence for sequence in self.live if sequence.needs_forward]
        return done

    def plan(self) -> list[tuple[Sequence, int]]:
        """Who is in the next forward, with how many prompt tokens each may feed; the others wait for the next one.

        All that decode, and of those that read their prompts as many as fit, the earlier first.
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
        """Of the next candidate, and of those after it."""
        if sequence.position is None:
            return 1.0, 0.0  # what is settled is taken
        first, later = (
            round(min(self._accepted[is_first], 0.95), 2) for is_first in (not sequence.position.states, False)
        )
        return first, later

    def observe(self, verdict: Verdict) -> None:
        """Learn from a decided position."""
        num_rejected = verdict.num_visited - verdict.accepted
        for place in range(verdict.num_visited):
            self._accepted[place == 0] += 0.05 * ((place == num_rejected) - self._accepted[place == 0])
