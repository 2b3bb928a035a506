"""Who is in the next forward, and how much of each; no tensors. It changes time, never tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from mara_integrations.engine.prefix import MIN_TOKENS, PrefixCache, shared
from mara_integrations.engine.sequence import Request, Sequence

# Tokens a forward takes for little more than the price of one: measured on CPU cores, reasoned for an accelerator,
# where a step is bound by reading the weights.
CPU_KNEE, ACCELERATOR_KNEE = 8, 200


class Scheduler:
    """Admission of requests, and the widths of what they feed.

    Args:
        max_live: Sequences decoded at once.
        prefill_chunk: Prompt tokens a sequence may feed in one forward.
        knee: Tokens a forward carries at little cost.
    """

    def __init__(self, *, max_live: int = 64, prefill_chunk: int = 512, knee: int = CPU_KNEE) -> None:
        self.max_live = max_live
        self.prefill_chunk = prefill_chunk
        self.knee = knee
        self.waiting: deque[Request] = deque()
        self.live: list[Sequence] = []
        self._first_accepted = 0.9  # running share of positions whose first candidate was taken

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
        done = [sequence for sequence in self.live if not sequence.is_waiting]
        self.live = [sequence for sequence in self.live if sequence.is_waiting]
        return done

    def width(self, sequence: Sequence) -> int:
        """Candidates to feed at once: one while firsts are mostly taken, then as many as come free, doubling.

        Many rows already fill a forward, so each feeds few; a lone row spends the spare width on its candidates.
        """
        fed = len(sequence.position.states) if sequence.position else 0
        spare = self.knee // max(1, len(self.live))
        if fed == 0 and self._first_accepted >= 0.83 and self.knee <= CPU_KNEE:
            return 1
        return max(1, spare, fed)

    def num_drafted(self, sequence: Sequence) -> int:
        """Tokens to feed behind a likely one: what a forward still carries at little cost."""
        if sequence.gated and self._first_accepted < 0.6:
            return 0  # what is fed behind a rejected candidate is lost
        return self.knee // max(1, len(self.live)) - 1

    def observe(self, taken: int) -> None:
        """Learn from a decided position."""
        self._first_accepted += 0.05 * ((taken == 0) - self._first_accepted)
